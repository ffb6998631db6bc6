"""What runs where TensorFlow is: tests/data/test_rlds_tfds.py starts it there. It knows no edgeml.

python tfds_program.py read DATASET_DIR OUT     the episodes as tfds reads them, pickled
python tfds_program.py write DATA_DIR OUT       a dataset of all kinds; then as above
"""

import os
import pickle
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import ml_dtypes
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

F = tfds.features
EPISODES = 5


def plain(node):
    if isinstance(node, dict):
        return {key: plain(part) for key, part in node.items()}
    if isinstance(node, tf.data.Dataset):
        return [plain(step) for step in node]
    if isinstance(node, tf.RaggedTensor):
        return node.to_list()
    return node.numpy()


def read(directory, out):
    builder = tfds.builder_from_directory(directory)
    split = builder.info.splits["train"]
    config = tfds.ReadConfig(interleave_cycle_length=1)  # in the order of the files
    episodes = [plain(e) for e in builder.as_dataset(split="train", read_config=config)]
    with open(out, "wb") as file:
        pickle.dump((builder.info.full_name, split.num_examples, split.num_shards, episodes), file)


class Everything(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        def tensor(dtype, *shape, encoding="none"):
            return F.Tensor(shape=shape, dtype=np.dtype(dtype), encoding=encoding)

        observation = {
            "image": F.Image(shape=(8, 9, 3), encoding_format="png"),
            "jpeg": F.Image(shape=(8, 9, 3), encoding_format="jpeg"),
            "gray": F.Image(shape=(8, 9, 1)),
            "any_size": F.Image(),
            "depth": F.Image(shape=(8, 9, 1), dtype=np.uint16),
            "float_image": F.Image(shape=(8, 9, 1), dtype=np.float32),
            "state": tensor("float32", 3),
            "double": tensor("float64", 3),
            "double_bytes": tensor("float64", 3, encoding="bytes"),
            "double_zlib": tensor("float64", 2, 3, encoding="zlib"),
            "half": tensor("float16", 3),
            "bfloat16": tensor(ml_dtypes.bfloat16, 3, encoding="bytes"),
            "complex": tensor("complex64", 3, encoding="bytes"),
            "bytes": tensor("uint8", 3),
            "bytes_zlib": tensor("uint8", 4, 5, encoding="zlib"),
            "unsigned": tensor("uint64", 2),
            "unsigned_bytes": tensor("uint64", 2, encoding="bytes"),
            "uint32": tensor("uint32", 2),
            "int8": tensor("int8", 2, 2),
            "bool_bytes": tensor("bool", 2, 2, encoding="bytes"),
            "any_shape": tensor("int16", None, None, 2, encoding="zlib"),
            "strings": tensor("str", 2),
            "nested": {"deeper": {"box": F.BBoxFeature()}},
            "sequence": F.Sequence(np.int32),
            "sequence_of_dicts": F.Sequence({"a": F.Text(), "b": tensor("float32", 2)}),
            "sequences": F.Sequence(F.Sequence(np.int32)),
        }
        step = {
            "observation": F.FeaturesDict(observation),
            "action": tensor("float32", 2),
            "label": F.ClassLabel(names=["x", "y"]),
            "reward": F.Scalar(np.float32),
            "discount": np.float32,
            "is_first": np.bool_,
            "is_last": np.bool_,
            "is_terminal": np.bool_,
            "language_instruction": F.Text(),
        }
        metadata = {
            "path": F.Text(),
            "n": np.int64,
            "optional": F.Scalar(np.int32, optional=True),
            "tags": F.Sequence(F.Text()),
            "images": F.Sequence(F.Image(shape=(2, 2, 3))),
        }
        features = F.FeaturesDict({"steps": F.Dataset(step), "episode_metadata": metadata})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
        return {"train": self._generate_examples(EPISODES), "other": self._generate_examples(2)}

    def _generate_examples(self, n):
        for i in range(n):
            steps = 3 + i
            yield (
                i,
                {
                    "steps": [self.step(i, t, steps) for t in range(steps)],
                    "episode_metadata": {
                        "path": f"path/{i}",
                        "n": -i,
                        "optional": None if i % 2 else i,
                        "tags": ["tag"] * i,
                        "images": [np.full((2, 2, 3), k, np.uint8) for k in range(i + 1)],
                    },
                },
            )

    def step(self, i, t, steps):
        rng = np.random.default_rng([i, t])

        def octets(*shape):
            return rng.integers(0, 256, shape).astype(np.uint8)

        def normal(dtype, *shape):
            return rng.normal(size=shape).astype(dtype)

        smooth = np.broadcast_to(np.linspace(90, 120, 9)[:, None], (8, 9, 3)).astype(np.uint8)
        return {
            "observation": {
                "image": octets(8, 9, 3),
                "jpeg": smooth + np.uint8(t),
                "gray": octets(8, 9, 1),
                "any_size": octets(5, 4 + t, 3),
                "depth": octets(8, 9, 1).astype(np.uint16) * 257,
                "float_image": normal("f4", 8, 9, 1),
                "state": normal("f4", 3),
                "double": normal("f4", 3).astype("f8"),
                "double_bytes": normal("f8", 3),
                "double_zlib": normal("f8", 2, 3),
                "half": normal("f2", 3),
                "bfloat16": normal(ml_dtypes.bfloat16, 3),
                "complex": normal("c8", 3),
                "bytes": octets(3),
                "bytes_zlib": octets(4, 5),
                "unsigned": np.array([2**63 + t, t], np.uint64),
                "unsigned_bytes": np.array([2**64 - 1, t], np.uint64),
                "uint32": np.array([2**32 - 1, t], np.uint32),
                "int8": np.array([[-1, 2], [-128, t]], np.int8),
                "bool_bytes": rng.random((2, 2)) < 0.5,
                "any_shape": rng.integers(-9, 9, (t, 2, 2)).astype(np.int16),
                "strings": ["a", f"ü{t}"],
                "nested": {"deeper": {"box": F.BBox(0.1, 0.2, 0.3, 0.4)}},
                "sequence": list(range(t)),
                "sequence_of_dicts": [{"a": f"{k}", "b": np.float32([k, t])} for k in range(t)],
                "sequences": [[1] * k for k in range(t)],
            },
            "action": np.float32([i, t]),
            "label": t % 2,
            "reward": np.float32(i + t / 10),
            "discount": np.float32(1),
            "is_first": t == 0,
            "is_last": t == steps - 1,
            "is_terminal": t == steps - 1 and i % 2 == 0,
            "language_instruction": f"do {t} ü",
        }


def write(directory, out):
    builder = Everything(data_dir=directory)
    builder.download_and_prepare()
    read(builder.data_dir, out)


if __name__ == "__main__":
    {"read": read, "write": write}[sys.argv[1]](*sys.argv[2:])
