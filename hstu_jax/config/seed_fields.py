"""Every field of the reference's configuration and what becomes of it here.

One table, read three times: `resolve.py` answers a field name or value of the reference with it,
the tests hold it against the schema and the seed's document, and `python -m
hstu_jax.config.seed_fields` writes `docs/seed-fields.md` from it.
"""

import collections
from collections.abc import Iterable

from hstu_jax.config.seed_entry import SeedField, SeedValue
from hstu_jax.config.seed_input_fields import INPUT, INPUT_VALUES
from hstu_jax.config.seed_model_fields import MODEL, MODEL_VALUES
from hstu_jax.config.seed_own_fields import OWN
from hstu_jax.config.seed_train_fields import TRAIN, TRAIN_VALUES

FIELDS: tuple[SeedField, ...] = (*MODEL, *INPUT, *TRAIN)
VALUES: tuple[SeedValue, ...] = (*MODEL_VALUES, *INPUT_VALUES, *TRAIN_VALUES)
# Paths into a warehouse: no field takes one.
WAREHOUSE = "odps://"
WAREHOUSE_NOTE = "export the table to parquet, a sampler's to a text file, and give its path"

_TITLES = {
    "model_config": "Model",
    "data_config": "Data and samplers",
    "feature_configs": "Features",
    "train_config": "Training",
    "eval_config": "Evaluation",
    "export_config": "Export",
}
_HEAD = """\
# Every field of the reference's configuration

Written by `python -m hstu_jax.config.seed_fields > docs/seed-fields.md`; not to be edited by hand.
The reference is HSTU Match of TorchEasyRec 1.3.16. A field is the **same** here, **renamed** (or
another shape of the same thing) or **refused**, with the reason and the way out; one that is set
where it does not exist gives an error with that text. `<f>` stands for a feature's name
(`uih_seq__video_id` in a sequence), `<s>` for a sequence's, `.*` for a section or the names in it.
What fields do differently on purpose is in `docs/reference-differences.md`.
"""


def find(path: str) -> SeedField | None:
    """The reference's field that an unknown field of ours was meant to be, or None.

    Args:
        path: where it was written, such as "train.is_profiling". Of several fields with that name
            the one whose place (there or here) shares most sections with it is taken.
    """
    *sections, name = path.split(".")

    def num_shared(field: SeedField) -> int:
        places = {part.removesuffix("_config") for part in field.path.split(".")}
        return len(set(sections) & (places | set(field.ours.split("."))))

    return max((f for f in FIELDS if f.name == name), key=num_shared, default=None)


def answer(field: SeedField) -> tuple[str, str]:
    """Rule and advice for a message about a field of the reference that was set here."""
    if field.fate == "refused":
        return "is the reference's field, and refused here", field.note
    ours = field.ours.removesuffix(".*")
    return "is the reference's field", f"here it is {ours}" + (
        f": {field.note}" if field.note else ""
    )


def answer_value(path: str, value: object) -> tuple[str, str] | None:
    """Rule and advice for a message about a value of the reference; None where it is none."""
    if isinstance(value, str) and value.startswith(WAREHOUSE):
        return "is not a file path", WAREHOUSE_NOTE
    notes = (v.note for v in VALUES if (v.field, v.value) == (path, value))
    note = next(notes, None)
    return None if note is None else ("is the reference's value", note)


def markdown() -> str:
    """The page `docs/seed-fields.md`."""
    sections = collections.defaultdict(lambda: collections.defaultdict(list))
    for field in FIELDS:
        top, _, rest = field.path.partition(".")
        sections[_TITLES[top] if rest else "Paths"][_parent(field.path)].append(field)
    pages = [_HEAD]
    for title, messages in sections.items():
        pages.append(f"## {title}\n")
        pages += [_message(path, fields) for path, fields in messages.items()]
    values = [(_code(v.field), _code(v.value), v.note) for v in VALUES]
    values.append(("any path", _code(f"{WAREHOUSE}..."), WAREHOUSE_NOTE))
    pages.append("## Values\n\n" + _table(("here", "value there", "what to write"), values))
    own = [(_code(path), meaning) for path, meaning in OWN.items()]
    pages.append("## Fields that the reference lacks\n\n" + _table(("here", "meaning"), own))
    return "\n".join(pages)


def _message(path: str, fields: list[SeedField]) -> str:
    """The fields of one message of the reference: those without a remark on a line."""
    plain = collections.defaultdict(list)
    for field in fields:
        if field.fate == "same" and not field.note:
            plain[_parent(field.ours)].append(_code(field.name))
    rows = [
        (_code(field.name), field.fate, _code(field.ours), field.note)
        for field in fields
        if field.fate != "same" or field.note
    ]
    parts = [f"### {_code(path)}\n"] if path else []
    parts += [f"Same in {_code(ours)}: {', '.join(names)}.\n" for ours, names in plain.items()]
    parts += [_table(("there", "fate", "here", "note"), rows)] if rows else []
    return "\n".join(parts)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.strip() for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    print(markdown(), end="")
