"""toy"""

from pathlib import Path

# What comes with the package: the toy model, and the image model that its training starts from.
SHIPPED = Path(__file__).parent / "model"
SHIPPED_IMAGE = Path(__file__).parent / "image_model"
