"""The table of the reference's fields: data, features, samplers, and the pipeline's own paths.

Source: the protobuf messages of TorchEasyRec 1.3.16; of a feature those fields that HSTU Match
reads.
"""

from hstu_jax.config.seed_entry import SeedField, SeedValue, refused, renamed, same

_LOADER = "a setting of its data loader"
_GENERATOR = "a setting of its feature generator"
_CSV = "CSV files are not read; write parquet"
_TYPES = "names and types of columns come from the files; leave it out"
_V2 = "the V2 samplers are not built yet; use negative_sampler or hard_negative_sampler"

_PIPELINE = renamed(
    "",
    "",
    {
        "train_input_path": (
            "data.list_columns.train_input_path",
            "with data.source='list_columns'; an event store is data.path. odps:// is refused",
        ),
        "eval_input_path": ("data.list_columns.eval_input_path", "likewise; the split 'test'"),
        "model_dir": ("workdir", ""),
    },
)

_DATA = (
    SeedField(
        "data_config.batch_size",
        "same",
        "data.batch_size",
        "users of a batch, at most: with data.layout='packed' a batch also ends when its slots "
        "are used",
    ),
    *same("data_config", "data", "label_fields sample_weight_fields"),
    *renamed(
        "data_config",
        "",
        {
            "dataset_type": (
                "data.source",
                "ParquetDataset is 'list_columns'; the others are refused: write parquet",
            ),
            "fg_encoded_multival_sep": ("features.<f>.separator", "set for each feature"),
        },
    ),
    *refused(
        "data_config",
        {
            "fg_mode": f"{_GENERATOR}: columns hold the values of features (its FG_NONE); leave it "
            "out",
            "fg_threads": f"{_GENERATOR}; leave it out",
            "force_base_data_group": "every window has all of its groups, which is what it asks "
            "for; leave it out",
            "num_workers": f"{_LOADER}: one thread makes batches ahead; see data.num_prefetch",
            "pin_memory": f"{_LOADER}; leave it out",
            "in_order": f"{_LOADER}: batches always come in order; leave it out",
            "drop_remainder": f"{_LOADER}: every window is in exactly one batch; leave it out",
            "shuffle": "every epoch is a permutation of all windows, drawn from `seed`; leave it "
            "out",
            "shuffle_buffer_size": "every epoch is a permutation of all windows; leave it out",
            "eval_batch_size": "evaluation takes data.batch_size too; leave it out",
            "sample_cost_field": "cost is counted in tokens: data.layout='packed' fills batches by "
            "them",
            "batch_cost_size": "cost is counted in tokens; see data.tokens_per_group",
            "sample_mask_prob": "acts on features with use_mask, which HSTU Match has not; leave "
            "it out",
            "negative_sample_mask_prob": "acts on features with use_mask, which HSTU Match has "
            "not; leave it out",
            "input_fields.input_name": _TYPES,
            "input_fields.input_type": _TYPES,
            "input_fields_str": _TYPES,
            "delimiter": _CSV,
            "with_header": _CSV,
        },
    ),
)

_IN_SEQUENCE = {
    "sequence_length": ("sequences.<s>.sequence_length", "set once for a sequence"),
    "sequence_delim": ("sequences.<s>.sequence_delim", "set once for a sequence"),
}


def _features(parent: str) -> tuple[SeedField, ...]:
    """Id and raw features, which stand alone or in a sequence."""
    id_feature, raw_feature = f"{parent}.id_feature", f"{parent}.raw_feature"
    start = "uniform within +- init_bound; its expressions are not evaluated"
    return (
        *renamed(id_feature, "", {"feature_name": ("features.<f>.*", "a feature's name is a key")}),
        *same(
            id_feature,
            "features.<f>",
            "expression embedding_name embedding_dim num_buckets hash_bucket_size vocab_list "
            "vocab_file value_dim pooling default_value separator",
        ),
        *renamed(
            id_feature,
            "",
            {
                "init_fn": ("features.<f>.init_bound", start),
                "fg_encoded_default_value": ("features.<f>.default_value", "one default for all"),
                **_IN_SEQUENCE,
            },
        ),
        *refused(
            id_feature,
            {
                "vocab_dict": "vocab_list gives its words the ids 2, 3, ... in order, so list them "
                "by id; for other ids write these into the data and use num_buckets",
                "weighted": "weighted pooling is not built; use pooling",
                "trainable": "every table is trained; leave it out",
                "data_type": "tables are float32; leave it out",
            },
        ),
        *renamed(
            raw_feature,
            "",
            {"feature_name": ("raw_features.<f>.*", "a feature's name is a key")},
        ),
        *same(
            raw_feature,
            "raw_features.<f>",
            "expression value_dim boundaries default_value separator embedding_dim embedding_name",
        ),
        *renamed(
            raw_feature,
            "",
            {
                "normalizer": (
                    "raw_features.<f>.normalizer.*",
                    "a section in place of the string 'method=log10,threshold=...'; an expression "
                    "is not evaluated",
                ),
                "init_fn": ("raw_features.<f>.init_bound", start),
                **_IN_SEQUENCE,
            },
        ),
    )


_FEATURES = (
    *_features("feature_configs"),
    *_features("feature_configs.sequence_feature.features"),
    *renamed(
        "feature_configs.sequence_feature",
        "",
        {"sequence_name": ("sequences.<s>.*", "a key; it also begins the names of its features")},
    ),
    SeedField(
        "feature_configs.sequence_feature.sequence_length",
        "same",
        "sequences.<s>.sequence_length",
        "with data.source='list_columns'; histories of an event store are cut by "
        "model.user_tower.max_seq_len",
    ),
    SeedField(
        "feature_configs.sequence_feature.sequence_delim",
        "same",
        "sequences.<s>.sequence_delim",
        "with data.source='list_columns'",
    ),
    *refused(
        "feature_configs.sequence_feature",
        {"sequence_pk": f"{_GENERATOR}, used when serving; leave it out"},
    ),
)

_SAMPLER = "data.negative_sampler"
_HARD = (
    "user_input_path item_input_path hard_neg_edge_input_path num_sample num_hard_sample "
    "attr_fields item_id_field user_id_field attr_delimiter num_eval_sample field_delimiter"
)
_SAMPLERS = (
    *renamed(
        "data_config",
        _SAMPLER,
        {
            "negative_sampler": ("kind", "the value 'NegativeSampler'"),
            "hard_negative_sampler": ("kind", "the value 'HardNegativeSampler'"),
        },
    ),
    *same(
        "data_config.negative_sampler",
        _SAMPLER,
        "input_path num_sample num_eval_sample field_delimiter",
    ),
    *refused(
        "data_config.negative_sampler",
        {
            "attr_fields": "negatives get their features from the data's own items, not from the "
            "table; leave it out",
            "item_id_field": "negatives are items of the group candidate already; leave it out",
            "attr_delimiter": "the table's attrs are not read; leave it out",
            "item_id_delim": "the table's attrs are not read; leave it out",
        },
    ),
    *same("data_config.hard_negative_sampler", _SAMPLER, _HARD),
    *(
        field
        for name, fields in {
            "negative_sampler_v2": "user_input_path item_input_path pos_edge_input_path num_sample "
            "attr_fields item_id_field user_id_field attr_delimiter num_eval_sample "
            "field_delimiter",
            "hard_negative_sampler_v2": f"{_HARD} pos_edge_input_path",
        }.items()
        for field in (
            *refused("data_config", {name: _V2}),
            *refused(f"data_config.{name}", dict.fromkeys(fields.split(), _V2)),
        )
    ),
)

INPUT = (*_PIPELINE, *_DATA, *_FEATURES, *_SAMPLERS)

_NO_FORMAT = "is not read; write the rows as parquet and use 'list_columns'"
INPUT_VALUES = (
    SeedValue("data.source", "ParquetDataset", "write 'list_columns'"),
    *(
        SeedValue("data.source", name, _NO_FORMAT)
        for name in ("OdpsDataset", "OdpsDatasetV1", "CsvDataset", "KafkaDataset")
    ),
)
