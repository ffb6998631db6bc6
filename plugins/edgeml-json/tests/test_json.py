import numpy as np
import pytest
from edgeml_json import JsonCodec

from edgeml.core import Malformed, Message, NotEncodable
from edgeml.images import ImageCodec, Jpeg, Plan
from edgeml.testing import CodecTests


class TestJson(CodecTests):
    codec = JsonCodec()

    def test_it_can_be_read(self) -> None:
        message = self.codec.encode({"joints": np.array([0.5, 1], "f4"), "käfer": (1, None)})
        assert message.header.decode() == (
            '{"joints": {"$array": ["<f4", [2], [0.5, 1.0]]}, "käfer": {"$tuple": [1, null]}}'
        )

    @pytest.mark.parametrize("value", [{"$array": 1}, {"$": {"$$x": 2}}, (1, (2, [])), 2**70])
    def test_what_json_has_no_word_for(self, value: object) -> None:
        assert self.round_trip(value) == value

    @pytest.mark.parametrize("value", [{1: 2}, np.array(["x", None])])
    def test_what_is_refused(self, value: object) -> None:
        with pytest.raises(NotEncodable, match=r"value\[0\]\['x'\]"):
            self.codec.encode([{"x": value}])

    @pytest.mark.parametrize("value", [1 << 20000, "\ud800"], ids=["long", "half"])
    def test_what_json_can_not_write_is_refused(self, value: object) -> None:
        with pytest.raises(NotEncodable):
            self.codec.encode(value)

    def test_what_nests_too_deep_is_refused(self) -> None:
        value: list[object] = []
        for _ in range(100_000):
            value = [value]
        with pytest.raises(NotEncodable):
            self.codec.encode(value)

    @pytest.mark.parametrize(
        "text",
        [
            '{"$array": ["O", [1], [1]]}',
            '{"$array": ["<f8", [-1], 0]}',
            '{"$array": ["<f8", [1], -1]}',
            '{"$array": ["<f8", [2], [1]]}',
            '{"$array": ["<u1", [1], [256]]}',
            '{"$array": [["<f8", 2], [1], 0]}',
            '{"$array": ["<f8,<f8", [1], 0]}',
            '{"$array": 5}',
            '{"$bytes": "?"}',
            '{"$tuple": 1}',
            '{"$unknown": 1}',
            '{"$tuple": [], "x": 1}',
            "[" * 100_000,
        ],
    )
    def test_forged_text_is_malformed(self, text: str) -> None:
        with pytest.raises(Malformed):
            self.codec.decode(Message(text.encode(), [memoryview(bytes(8))]))


class TestJsonWithImages(CodecTests):
    codec = ImageCodec(JsonCodec(), Plan({"photo*": Jpeg()}))

    def test_an_image_travels_as_a_file(self) -> None:
        photo = np.full((32, 48, 3), 120, np.uint8)
        message = self.codec.encode({"photo": photo, "step": 1})
        assert message.header.startswith(b"\xc1")
        got = self.round_trip({"photo": photo, "step": 1})
        assert got["step"] == 1
        assert np.abs(got["photo"].astype(int) - photo).max() < 4
