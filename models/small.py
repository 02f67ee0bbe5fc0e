"""Small models that come with the project: scripts/train.py trains them, their weights are beside this file."""

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


def cifar_vit(num_classes: int = 10, img_size: int | tuple[int, int] = 128, patch_size: int = 16) -> VisionTransformer:
    """A ViT of 1.3 M parameters on 64 patches of 16x16 pixels, of photographs enlarged from 32x32."""
    return VisionTransformer(
        img_size=img_size, patch_size=patch_size, embed_dim=128, depth=6, num_heads=4, num_classes=num_classes
    )


def cifar_swin(num_classes: int = 10, img_size: int | tuple[int, int] = 128, patch_size: int = 8) -> SwinTransformer:
    """A Swin of 1.5 M parameters: 16x16 patches of 8x8 pixels in windows of 4x4, then 8x8 of them, then 4x4.

    Of photographs that are enlarged from 32x32, too.
    """
    return SwinTransformer(
        img_size=img_size,
        patch_size=patch_size,
        window_size=4,
        embed_dim=48,
        depths=(2, 4, 2),
        num_heads=(2, 4, 8),
        num_classes=num_classes,
        drop_path_rate=0.0,
    )


SMALL_MODELS = {"demo_vit": demo_vit, "demo_swin": demo_swin, "cifar_vit": cifar_vit, "cifar_swin": cifar_swin}
# By name of utils.photographs.find_dataset: what each was trained on, and is evaluated on unless told otherwise
DATASETS = {"demo_vit": "demo", "demo_swin": "demo", "cifar_vit": "cifar10", "cifar_swin": "cifar10"}
