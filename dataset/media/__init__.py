"""Pixels of images and videos: uint8 RGB, upright, resized and cropped to a bucket.

A frame is an array (H, W, 3), a clip (F, H, W, 3). Other modules import these names from here.
"""

from dataset.media.clips import MiscountError, load_pixels, read_clips, read_media_info
from dataset.media.images import MediaError, load_image, resize_to_bucket, to_rgb

__all__ = [
    "MediaError",
    "MiscountError",
    "load_image",
    "load_pixels",
    "read_clips",
    "read_media_info",
    "resize_to_bucket",
    "to_rgb",
]
