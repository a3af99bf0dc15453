"""Label images with an exported model: ONNX Runtime, NumPy and Pillow alone.

python examples/predict_onnx.py model.onnx image.jpg another.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read_rgb(file: str, side: int, drafts: bool) -> Image.Image:
    """Return an image upright: transparency on white, 16-bit grey scaled to 8 bits.

    Drafts are JPEG files decoded at the smallest size that is twice the model's input.
    """
    picture = Image.open(file)
    draft = picture.draft(None, (2 * side, 2 * side)) if drafts else None  # None of other formats
    if draft is not None:
        picture = picture.crop((0, 0, round(draft[1][2]), round(draft[1][3])))
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = Image.fromarray(((np.asarray(picture, np.int64) + 128) // 257).astype(np.uint8))
    elif picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = {k: v for k, v in session.get_modelmeta().custom_metadata_map.items() if k != "head"}
names, preprocessing = json.loads(about["labels"]), json.loads(about["preprocessing"])
side, how = preprocessing["image_size"], preprocessing["interpolation"].upper()
for file in sys.argv[2:]:
    square = read_rgb(file, side, preprocessing["jpeg_draft"])
    square = square.resize((side, side), Image.Resampling[how])
    pixels = np.asarray(square)[None]  # [1, S, S, 3] uint8
    labels, lengths, log_probs = session.run(["labels", "lengths", "log_probs"], {"images": pixels})
    print(file, [names[i] for i in labels[0, 0, : lengths[0, 0]]], f"{log_probs[0, 0]:.4f}")
