"""The names of SMP's DeepLab decoders and segmentation head, and ours."""

from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.zoo.origins.renaming import Rules

_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


def head_rules(config: DeepLabConfig) -> Rules:
    """Return the rules that turn the names of decoder and head into ours; in V3+ ASPP is the first of a Sequential."""
    aspp = r"decoder\.aspp\.0" if config.architecture == "deeplabv3plus" else r"decoder\.aspp"
    norm = "pointwise.norm" if config.aspp_separable else "norm"
    return (
        (rf"{aspp}\.convs\.0\.0\.weight", "head.aspp.branches.0.conv.weight"),
        (rf"{aspp}\.convs\.0\.1\.{_NORM}", r"head.aspp.branches.0.norm.\1"),
        (rf"{aspp}\.convs\.([123])\.0\.weight", r"head.aspp.branches.\1.conv.weight"),
        (rf"{aspp}\.convs\.([123])\.0\.0\.weight", r"head.aspp.branches.\1.depthwise.conv.weight"),
        (rf"{aspp}\.convs\.([123])\.0\.1\.weight", r"head.aspp.branches.\1.pointwise.conv.weight"),
        (rf"{aspp}\.convs\.([123])\.1\.{_NORM}", rf"head.aspp.branches.\1.{norm}.\2"),
        (rf"{aspp}\.convs\.4\.1\.weight", "head.aspp.pool.conv.weight"),
        (rf"{aspp}\.convs\.4\.2\.{_NORM}", r"head.aspp.pool.norm.\1"),
        (rf"{aspp}\.project\.0\.weight", "head.aspp.project.conv.weight"),
        (rf"{aspp}\.project\.1\.{_NORM}", r"head.aspp.project.norm.\1"),
        (r"decoder\.conv\.weight", "head.refine.conv.weight"),
        (rf"decoder\.bn\.{_NORM}", r"head.refine.norm.\1"),
        (r"decoder\.aspp\.1\.0\.weight", "head.refine.depthwise.conv.weight"),
        (r"decoder\.aspp\.1\.1\.weight", "head.refine.pointwise.conv.weight"),
        (rf"decoder\.aspp\.2\.{_NORM}", r"head.refine.pointwise.norm.\1"),
        (r"decoder\.block1\.0\.weight", "head.low_level.conv.weight"),
        (rf"decoder\.block1\.1\.{_NORM}", r"head.low_level.norm.\1"),
        (r"decoder\.block2\.0\.0\.weight", "head.decoder.0.depthwise.conv.weight"),
        (r"decoder\.block2\.0\.1\.weight", "head.decoder.0.pointwise.conv.weight"),
        (rf"decoder\.block2\.1\.{_NORM}", r"head.decoder.0.pointwise.norm.\1"),
        (r"segmentation_head\.0\.(weight|bias)", r"head.classifier.\1"),
    )
