"""MMMU, validation: college questions of thirty subjects, some with several images.

`MMMU_DEV_VAL.tsv` also holds the development split, which is not asked. As in VLMEvalKit, a
question without options is marked as one between its answer and "Other Answers".
"""

import string

from flashvl.eval.tasks.multiple_choice import MultipleChoice
from flashvl.eval.tasks.prompts import options_of
from flashvl.eval.tasks.tsv import Fields


class MMMU(MultipleChoice):
    name = "mmmu"
    title = "MMMU"
    file = "MMMU_DEV_VAL"

    def is_asked(self, fields: Fields) -> bool:
        return fields.get("split", "validation") == "validation"

    def options(self, fields: Fields) -> dict[str, str]:
        return options_of(fields) or {"A": fields["answer"], "B": "Other Answers"}

    def right_option(self, fields: Fields) -> str:
        answer = fields["answer"]
        return answer if len(answer) == 1 and answer in string.ascii_uppercase else "A"
