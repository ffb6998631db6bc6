"""Images as files in memory, and on the wire.

- `Jpeg`, `Png`: how an end's images travel; see ``images=`` of any server or client.
- `decode_image`, `encode_image`: image files of pixels.

Needs simplejpeg or Pillow for JPEG, and Pillow for the rest, imported when they are used.
"""

from edgeml.images.agreement import Images
from edgeml.images.codec import MARK, ImageCodec, Plan
from edgeml.images.files import decode_image, encode_image
from edgeml.images.formats import Format, Jpeg, Png

__all__ = [
    "MARK",
    "Format",
    "ImageCodec",
    "Images",
    "Jpeg",
    "Plan",
    "Png",
    "decode_image",
    "encode_image",
]
