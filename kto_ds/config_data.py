"""The section `data` of a config: sources, their field and label maps, limits, and what bad rows do."""

import json
import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, JsonValue, Tag, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from kto_ds.config_types import Count, Folder, Positive, Section, Text
from kto_ds.errors import excerpt

# What a row may hold. A source's `columns` says under which name its table has a field; records.py says which of them make a row.
FIELDS = (
    "prompt", "completion", "label", "chosen", "rejected", "messages", "conversations", "tools", "chat_template_kwargs", "system",
    "instruction", "input", "output", "history", "output_A", "output_B", "kto_tag",
)  # fmt: skip
# Names of one and the same thing.
SYNONYMS = (frozenset({"label", "kto_tag"}), frozenset({"messages", "conversations"}))
# Options of a chat template that are decided elsewhere, for a row's own and for those of the config.
RESERVED_TEMPLATE_KWARGS = frozenset(
    "tools tokenize chat_template conversation messages add_generation_prompt continue_final_message return_dict return_tensors padding truncation max_length".split()
)
HELD_OUT = "held_out"


class SourceConfig(Section):
    path: Text = Field(description="JSON, JSONL, Parquet or CSV file, a glob of such files, a folder saved by datasets, or a hub name")
    split: str | None = Field(None, description="split of a hub or saved dataset")
    weight: Annotated[Positive, Field(le=100)] = Field(
        1.0, description="how often an epoch has the source's rows: 2 is twice, 0.5 all rows of a seeded half of its prompts; training only"
    )
    columns: dict[str, Text] = Field({}, description="our field: the table's column, where their names differ")
    label_map: dict[str, bool] | None = Field(None, description="label, as the table has it written: true (desirable) or false, where labels are not booleans")

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        if unknown := sorted(columns.keys() - set(FIELDS)):
            if (field := columns[unknown[0]]) in FIELDS:
                raise ValueError(f"you wrote it the wrong way round; write our field first: {field}: {excerpt(unknown[0])}")
            raise ValueError(f"{excerpt(unknown[0])} is not a field of ours; write our field: the table's column, with one of {', '.join(FIELDS)}")
        if twice := sorted({column for column in columns.values() if list(columns.values()).count(column) > 1}):
            raise ValueError(f"column {excerpt(twice[0])} is given to two fields; give each field a column of its own")
        if two := next((same for same in SYNONYMS if columns.keys() >= same), None):
            raise ValueError(f"{' and '.join(sorted(two))} are two names of one field, and each is given a column; keep one")
        return columns

    @field_validator("label_map", mode="before")
    @classmethod
    def _check_label_map(cls, labels: object) -> object:
        """Bring the keys to JSON text, since YAML has numbers and booleans as keys and JSON has not."""
        if not isinstance(labels, dict):
            return labels
        if not labels:
            raise ValueError("an empty map gives no row a label; list the labels of the table, or remove label_map")
        texts = {}
        for label, desirable in labels.items():
            if not isinstance(label, (str, int, float)):
                raise ValueError(f"label {excerpt(label)} is not a text, a number or a boolean; list the labels as the table has them")
            if not isinstance(desirable, bool):
                raise ValueError(f"{excerpt(label)} is mapped to {excerpt(desirable)}; map every label to true (desirable) or false (undesirable)")
            text = label if isinstance(label, str) else json.dumps(int(label) if isinstance(label, float) and label.is_integer() else label)
            if text in texts:
                raise ValueError(f"label {excerpt(text)} is listed twice, as a number and its text are the same; list it once")
            texts[text] = desirable
        return texts


def _read_json(value: object) -> object:
    # An option of the command line is a text, and is read here, since pydantic_settings tells lists and mappings apart by type only.
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a list of sources in JSON ({error})") from error


Sources = list[SourceConfig]
NamedSources = dict[str, Annotated[Sources, Field(min_length=1)]]
EvalSources = Annotated[
    Annotated[Sources, Tag("<list>")] | Annotated[NamedSources, Tag("<mapping>")],
    Discriminator(lambda value: "<mapping>" if isinstance(value, dict) else "<list>"),
]


class DataConfig(Section):
    train: Annotated[Sources, NoDecode, BeforeValidator(_read_json)] = Field(min_length=1, description="training sources, read in order")
    eval: Annotated[EvalSources, NoDecode, BeforeValidator(_read_json)] = Field([], description="evaluation sources, read in order; or several evaluation splits, name: sources")
    held_out_fraction: Annotated[Positive, Field(lt=1)] | None = Field(None, description="share of the training prompts held out as evaluation split eval/held_out")
    max_length: Annotated[Count, Field(ge=2)] = Field(2048, description="tokens of prompt and completion together")
    max_prompt_length: Count | None = Field(None, description="tokens of a prompt; null: only max_length counts")
    max_completion_length: Count | None = Field(None, description="tokens of a completion; null: only max_length counts")
    truncation_mode: Literal["keep_start", "keep_end", "drop", "error"] = Field(
        "keep_start", description="long completions lose their end, and long prompts their end (keep_start) or their start (keep_end); or the row is dropped, or refused"
    )
    append_eos: bool = Field(True, description="end plain-text completions with the end-of-sequence token")
    special_tokens_in_text: Literal["warn", "error"] = Field("warn", description="what the text of a special token in a row does")
    chat_template_kwargs: dict[str, JsonValue] = Field({}, description="options for the chat template; a row's own go before them")
    shuffle: bool = Field(True, description="seeded grouping and epoch order; false keeps file order")
    kl_group_size: Annotated[Count, Field(ge=2)] = Field(4, description="distinct prompts among which completions are swapped for the reference point")
    max_bad_fraction: Annotated[Positive, Field(le=1)] | None = Field(None, description="share of bad rows at which on_bad_row: skip gives up")
    on_bad_row: Literal["error", "skip"] = Field("error", validate_default=True, description="what a row that breaks the schema does; skip lists it in a file of rejects")
    allow_one_label: bool = Field(False, description="train on desirable or undesirable rows alone")
    dataset_num_proc: Count | None = Field(None, description="tokenization workers; the result does not depend on it")
    artifact: Folder | None = Field(None, description="dataset artefact; default <output_dir>/dataset")

    @field_validator("eval")
    @classmethod
    def _check_eval(cls, value: Sources | NamedSources) -> Sources | NamedSources:
        splits = value if isinstance(value, dict) else {"": value}
        for name, sources in splits.items():
            if isinstance(value, dict) and (not re.fullmatch(r"[\w-]+", name) or name == HELD_OUT):
                raise ValueError(f"{excerpt(name)} cannot name an evaluation split; use letters, digits, _ and -, and not {HELD_OUT}")
            if any(source.weight != 1 for source in sources):
                raise ValueError("weight is for training sources; remove it from the evaluation sources")
        return value

    @field_validator("max_prompt_length")
    @classmethod
    def _check_max_prompt_length(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value >= info.data.get("max_length", value + 1):
            raise ValueError(f"leaves no token for a completion within data.max_length = {info.data['max_length']}; lower it, or raise data.max_length")
        return value

    @field_validator("truncation_mode")
    @classmethod
    def _check_truncation_mode(cls, value: str, info: ValidationInfo) -> str:
        if value == "keep_end" and info.data.get("max_prompt_length", 0) is None:
            raise ValueError("keep_end cuts prompts, and needs to know where; set data.max_prompt_length")
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_chat_template_kwargs(cls, value: dict) -> dict:
        if reserved := sorted(value.keys() & RESERVED_TEMPLATE_KWARGS):
            raise ValueError(f"{reserved[0]} is decided by kto_ds; remove it")
        return value

    @field_validator("on_bad_row")
    @classmethod
    def _check_on_bad_row(cls, value: str, info: ValidationInfo) -> str:
        fraction = info.data.get("max_bad_fraction", 0)  # 0 where it is wrong in itself
        if value == "skip" and fraction is None:
            raise ValueError("skip needs a limit; set data.max_bad_fraction, such as 0.01")
        if value == "error" and fraction:
            raise ValueError("data.max_bad_fraction is only for on_bad_row: skip; set data.on_bad_row: skip, or remove data.max_bad_fraction")
        return value

    @property
    def eval_splits(self) -> dict[str, Sources]:
        """Evaluation sources by split name: `eval` for a list, `eval/<name>` for a mapping. The held-out split has no sources of its own."""
        if isinstance(self.eval, dict):
            return {f"eval/{name}": sources for name, sources in self.eval.items()}
        return {"eval": self.eval} if self.eval else {}
