"""The table of the reference's fields against our schema, the seed's document and its page."""

import collections.abc
import dataclasses
import functools
import json
import pathlib
import re
import types
import typing

import pytest

from configs import kuairand
from hstu_jax import cli
from hstu_jax.config import resolve, schema, seed_fields

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENT = ROOT.parent / "shared" / "reference" / "seed-hstu-match.txt"
# The document's sample configuration as [path, name of feature or sequence, value], so that a
# clone without the document checks the same; `test_record_is_the_documents_sample` compares.
RECORD = pathlib.Path(__file__).with_name("seed_sample.json")


def schema_fields(cls, path=""):
    """Paths of all fields below a dataclass, written as the table writes them."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield from _fields_of(hints[field.name], f"{path}.{field.name}" if path else field.name)


def _fields_of(hint, path):
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [each for each in typing.get_args(hint) if each is not type(None)]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is collections.abc.Mapping and dataclasses.is_dataclass(args[1]):
        yield from schema_fields(args[1], f"{path}.{'<s>' if path == 'sequences' else '<f>'}")
    elif origin is collections.abc.Mapping:
        yield f"{path}.*"
    elif origin is tuple and dataclasses.is_dataclass(args[0]):
        yield from schema_fields(args[0], path)
    elif dataclasses.is_dataclass(hint):
        yield from schema_fields(hint, path)
    else:
        yield path


OURS = set(schema_fields(schema.Config))


def test_every_counterpart_is_a_field_of_ours():
    found = {field.ours for field in seed_fields.FIELDS if field.fate != "refused"}
    sections = {ours for ours in found - OURS if ours.endswith(".*")}
    assert all(any(f.startswith(ours[:-1]) for f in OURS) for ours in sections), sections
    assert found <= OURS | sections


def test_every_field_of_ours_is_in_the_table_or_among_our_own():
    in_table = {field.ours for field in seed_fields.FIELDS}
    assert OURS - in_table == set(seed_fields.OWN)
    assert all(seed_fields.OWN.values())


def test_entries_are_whole_and_each_stands_once():
    paths = [field.path for field in seed_fields.FIELDS]
    assert len(paths) == len(set(paths))
    for field in seed_fields.FIELDS:
        assert (field.ours == "") == (field.fate == "refused"), field
        assert field.note or field.fate != "refused", field
        name = field.ours.rsplit(".", 1)[-1]
        assert field.fate != "same" or name == field.name, field


def test_page_is_the_tables():
    page = (ROOT / "docs" / "seed-fields.md").read_text()
    assert page == seed_fields.markdown(), "run python -m hstu_jax.config.seed_fields"


def parse(text):
    """Protobuf text -> [(name, value or nested list)]; `...` is passed over."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|\.\.\.|[^\s{}\[\]:,"]+', text)
    at = 0

    def value():
        nonlocal at
        token, at = tokens[at], at + 1
        if token == "[":
            items = []
            while tokens[at] != "]":
                items.append(value())
                at += tokens[at] == ","
            at += 1
            return items
        try:  # numbers and strings are written as JSON writes them; names of enums are not
            return json.loads(token)
        except json.JSONDecodeError:
            return token

    def message():
        nonlocal at
        fields = []
        while at < len(tokens) and tokens[at] != "}":
            name, at = tokens[at], at + 1
            if name == "...":
                continue
            if tokens[at] == ":":
                at += 1
                fields.append((name, value()))
            else:
                at += 1
                fields.append((name, message()))
                at += 1
        return fields

    return message()


def flatten(message, path="", name="", sequence=""):
    """(path, feature or sequence that it belongs to, value) of all fields and empty messages."""
    for key, value in message:
        where = f"{path}.{key}" if path else key
        is_message = isinstance(value, list) and all(isinstance(v, tuple) for v in value)
        if not is_message:
            yield where, name, value
            continue
        if not value:
            yield where, name, None
        inner = dict(value)
        if key in ("id_feature", "raw_feature"):
            label = "__".join(filter(None, (sequence, inner["feature_name"])))
            yield from flatten(value, where, label)
        elif key == "sequence_feature":
            label = inner["sequence_name"]
            yield from flatten(value, where, label, label)
        elif key == "feature_groups":
            yield from flatten(value, where, inner["group_name"])
        else:
            yield from flatten(value, where, name, sequence)


def document_fields():
    text = DOCUMENT.read_text(encoding="utf-8")
    end = re.compile(r"^}\s*\n\s*\n", re.MULTILINE).search(text, text.index("hstu_match {")).end()
    return [list(entry) for entry in flatten(parse(text[text.index("data_config {") : end]))]


def sample_fields():
    return json.loads(RECORD.read_text())


@pytest.mark.skipif(not DOCUMENT.is_file(), reason="the seed's document is not part of a clone")
def test_record_is_the_documents_sample():
    assert document_fields() == sample_fields()


def test_parser_reads_every_form_that_the_document_has():
    text = 'a { ... b: [1, 2] c: "x|\\t" d {} d { e: -0.5 f: true g: NONE } }'
    tree = [("a", [("b", [1, 2]), ("c", "x|\t"), ("d", []), ("d", [("e", -0.5), ("f", True)])])]
    tree[0][1][3][1].append(("g", "NONE"))
    assert parse(text) == tree


def test_every_field_of_the_sample_is_in_the_table():
    known = {field.path for field in seed_fields.FIELDS}
    assert len(sample_fields()) > 100
    assert {path for path, _, _ in sample_fields()} <= known


# Where :seed has not the document's value at a field of the same name.
REFUSED_IN_SAMPLE = {
    "data_config.force_base_data_group",
    "data_config.negative_sampler.attr_fields",
    "data_config.negative_sampler.item_id_field",
    "data_config.negative_sampler.attr_delimiter",
    "model_config.feature_groups.group_type",
}
# What it stands for in our form, by (the configuration, the name of the feature, the value).
RENAMED_IN_SAMPLE = {
    "model_config.kernel": lambda c, _, v: (v, c.model.kernel) == ("TRITON", "auto"),
    "model_config.losses.softmax_cross_entropy": lambda c, _, v: c.loss is not None,
    "model_config.metrics.recall_at_k.top_k": lambda c, _, v: v in c.metrics.recall_at_k,
    "model_config.feature_groups.group_name": lambda c, _, v: v in c.feature_groups,
    "model_config.feature_groups.feature_names": lambda c, group, v: v in c.feature_groups[group],
    "model_config.hstu_match.user_tower.hstu.output_postprocessor.l2norm_postprocessor": (
        lambda c, _, v: c.model.user_tower.hstu.output_postprocessor == "l2norm"
    ),
    **dict.fromkeys(
        (
            "feature_configs.id_feature.feature_name",
            "feature_configs.raw_feature.feature_name",
            "feature_configs.sequence_feature.features.id_feature.feature_name",
            "feature_configs.sequence_feature.features.raw_feature.feature_name",
        ),
        lambda c, feature, _: feature in c.all_features,
    ),
    "feature_configs.sequence_feature.sequence_name": lambda c, _, v: v in c.sequences,
}
# Read over list columns; :seed reads an event store, where max_seq_len cuts histories.
OF_LIST_COLUMNS = {
    "feature_configs.sequence_feature.sequence_length",
    "feature_configs.sequence_feature.sequence_delim",
}
WAREHOUSE_PATHS = {"data_config.negative_sampler.input_path"}


def value_at(config, ours, name):
    parts = [name if part in ("<f>", "<s>") else part for part in ours.split(".")]
    return functools.reduce(
        lambda at, part: at[part] if isinstance(at, dict) else getattr(at, part), parts, config
    )


def check_value(config, path, name, value):
    (field,) = [each for each in seed_fields.FIELDS if each.path == path]
    if field.fate == "renamed":
        assert RENAMED_IN_SAMPLE[path](config, name, value), (path, name, value)
        return
    found = value_at(config, field.ours, name)
    if isinstance(found, tuple):  # a list, or one value of a repeated field
        found, value = list(found), value if isinstance(value, list) else [value]
    assert found == value, (path, name)


def test_seed_variant_has_the_samples_values():
    config = resolve.resolve(kuairand.get_config("seed"))
    refused = {f.path for f in seed_fields.FIELDS if f.fate == "refused"}
    seen = set()
    for path, name, value in sample_fields():
        if path in refused:
            seen.add(path)
        elif path in WAREHOUSE_PATHS:
            assert value.startswith(seed_fields.WAREHOUSE)
        elif path not in OF_LIST_COLUMNS:
            check_value(config, path, name, value)
    assert seen == REFUSED_IN_SAMPLE


def test_seed_variant_over_list_columns_takes_the_sequences_fields_too():
    raw = kuairand.get_config("seed")
    raw.data.source, paths = "list_columns", raw.data.list_columns
    for name in ("train_input_path", "validation_input_path", "eval_input_path"):
        paths[name] = "rows/*.parquet"
    entries = [entry for entry in sample_fields() if entry[0] in OF_LIST_COLUMNS]
    for path, name, value in entries:
        raw.sequences[name][path.rsplit(".", 1)[-1]] = value
    config = resolve.resolve(raw)
    assert len(entries) == 4
    for entry in entries:
        check_value(config, *entry)


def resolve_with(path, value):
    raw = kuairand.get_config()
    *sections, name = path.split(".")
    section = functools.reduce(lambda at, part: at[part], sections, raw)
    with raw.unlocked(), section.ignore_type():
        section[name] = value
    return resolve.resolve(raw)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "train.is_profiling",
            True,
            r"^train\.is_profiling=True: is the reference's field, and refused here; .*profiler\.$",
        ),
        ("train.dense_optimizer.fused", True, r"optimizer\.fused=True: .*refused here; chooses"),
        ("eval.num_steps", 5, r"^eval\.num_steps=5: .*refused here; evaluation takes the whole"),
        ("model.num_sample", 5, r"reference's field; here it is data\.negative_sampler\.num_sampl"),
        ("model_dir", "x", r"model_dir='x': is the reference's field; here it is workdir\."),
        ("features.user_id.trainable", True, r"user_id\.trainable=True: .*every table is trained"),
        (
            "model.user_tower.hstu.stu.sort_by_length",
            True,
            r"stu\.sort_by_length=True: .*block schedule",
        ),
        ("loss.label_smoothing", 0.1, r"label_smoothing=0\.1: .*refused here; .*no effect"),
        ("model.kernel", "TRITON", r"^model\.kernel='TRITON': is the reference's value; .*'auto'"),
        ("model.kernel", "PYTORCH", r"kernel='PYTORCH': is the reference's value; write 'xla'"),
        ("model.kernel", "CUTLASS", r"kernel='CUTLASS': .*there is no such kernel here"),
        ("model.similarity", "EUCLID", r"similarity='EUCLID': .*'INNER_PRODUCT'.*'COSINE'"),
        ("data.source", "CsvDataset", r"source='CsvDataset': .*write the rows as parquet"),
        ("data.path", "odps://p/tables/t", r"path='odps://p/tables/t': .*export the table to parq"),
        ("workdir", "odps://p", r"workdir='odps://p': is not a file path"),
    ],
)
def test_names_and_values_of_the_reference_are_answered(path, value, message):
    with pytest.raises(ValueError, match=message):
        resolve_with(path, value)


def test_a_locked_configuration_is_answered_on_the_command_line_too():
    raw = kuairand.get_config()
    with pytest.raises(AttributeError) as caught:
        raw.train.is_profiling = True
    assert cli.error_text(caught.value).startswith("is_profiling: is the reference's field, and")
    bare = cli.error_text(AttributeError("'sort_by_length'"))
    assert bare.startswith("sort_by_length: is the reference's field, and refused here; ")
    for error in (AttributeError("'num_stepz'"), AttributeError("'name' object"), OSError("name")):
        assert cli.error_text(error) == str(error)


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(entry) for entry in document_fields())
    RECORD.write_text(f"[\n{lines}\n]\n")
