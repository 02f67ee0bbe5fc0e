"""The two small models that come with the project, trained on utils/fractals.py by scripts/train_demo.py."""

from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from utils.fractals import IMAGE_SIZE, NUM_CLASSES


def demo_vit(num_classes: int = NUM_CLASSES, img_size: int | tuple[int, int] = IMAGE_SIZE) -> VisionTransformer:
    """A ViT of 0.7 M parameters on 64 patches of 8x8 pixels."""
    return VisionTransformer(
        img_size=img_size, patch_size=8, embed_dim=96, depth=6, num_heads=3, num_classes=num_classes
    )


def demo_swin(num_classes: int = NUM_CLASSES, img_size: int | tuple[int, int] = IMAGE_SIZE) -> SwinTransformer:
    """A Swin of 0.5 M parameters: 16x16 patches of 4x4 pixels in windows of 8x8, then one window of 8x8."""
    return SwinTransformer(
        img_size=img_size,
        patch_size=4,
        window_size=8,
        embed_dim=48,
        depths=(2, 4),
        num_heads=(2, 4),
        num_classes=num_classes,
        drop_path_rate=0.0,
    )
