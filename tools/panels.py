"""Panels for look_inside.py: an image with shapes on it, a map in colours, and many in a grid."""

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

WIDTH = 320  # of a panel, in pixels


def draw(image, caption, *layers, width=WIDTH, margin=0.0, faded=True):
    """A panel: an image [3, h, w], faded to grey, and layers on it in the image's coordinates.

    A layer is a pair of a tensor and a colour, or a list of colours: boxes [N, 4], points [N, 2],
    arrows [N, 2, 2] from their first point to their second, or masks [N, h, w] bool. `margin`
    leaves room around the image, as a share of its width.
    """
    scale = width / image.shape[2] / (1 + 2 * margin)
    border = round(margin * image.shape[2] * scale)
    size = (width - 2 * border, round(image.shape[1] * scale))
    picture = to_picture(image).resize(size, Image.BICUBIC)
    if faded:
        picture = ImageOps.posterize(ImageOps.grayscale(picture).point(lambda v: 110 + v // 2), 5)
    picture = ImageOps.expand(picture.convert("RGB"), border, "white")
    pen = ImageDraw.Draw(picture)
    for shapes, colors in layers:
        colors = [colors] * len(shapes) if isinstance(colors, str) else colors
        placed = shapes if shapes.dtype == torch.bool else shapes * scale + border
        for shape, color in reversed(list(zip(placed, colors))):
            if shapes.dtype == torch.bool:
                pen.bitmap((border, border), Image.fromarray(shape.numpy()).resize(size), color)
            elif shape.dim() == 2:
                draw_arrow(pen, *shape, color)
            elif len(shape) == 4:
                pen.rectangle(shape.tolist(), outline=color, width=1 if len(shapes) > 50 else 2)
            else:
                pen.circle(shape.tolist(), 1 if len(shapes) > 500 else 2, color)
    return titled(picture, caption)


def draw_arrow(pen, start, end, color):
    step = end - start
    along = 9 * step / step.norm().clamp(min=9)
    across = along.flip(0) * torch.tensor([0.5, -0.5])
    pen.line([*start.tolist(), *end.tolist()], color, 2)
    head = torch.stack([end, end - along + across, end - along - across])
    pen.polygon(head.flatten().tolist(), color)


def heat(values, caption, size=(WIDTH, WIDTH), most=None):
    """A panel of a map [h, w]: dark is its least value (0 if `most` is given), yellow its most."""
    values = values - (0 if most else values.min())
    gray = (63 * values / (most or values.max())).clamp(0, 63).byte() * 4
    picture = ImageOps.colorize(Image.fromarray(gray.numpy()), "#440154", "#fde725", "#21918c")
    return titled(picture.resize(size, Image.NEAREST), caption)


def to_picture(image):
    """A tensor [3, h, w] uint8 as Pillow's image."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def titled(picture, caption):
    sheet = Image.new("RGB", (picture.width + 8, picture.height + 26), "white")
    pen = ImageDraw.Draw(sheet)
    pen.fontmode = "1"  # without shades of grey: few colours make a small file
    pen.text((4, 2), caption, "black", ImageFont.load_default(14))
    sheet.paste(picture, (4, 20))
    return sheet


def grid(panels, width=1000):
    """Panels in rows of at most `width` pixels, as one picture."""
    w, h = (max(sides) for sides in zip(*(panel.size for panel in panels)))
    columns = max(1, min(len(panels), width // w))
    sheet = Image.new("RGB", (w * columns, h * -(-len(panels) // columns)), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i % columns * w, i // columns * h))
    return sheet.quantize(256)
