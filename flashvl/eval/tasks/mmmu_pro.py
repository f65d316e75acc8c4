"""MMMU-Pro: questions of MMMU that need their image, with up to ten options."""

from flashvl.eval.tasks.multiple_choice import MultipleChoice


class MMMUPro(MultipleChoice):
    name = "mmmu_pro"
    title = "MMMU Pro"
    file = "MMMU_Pro_10c"
