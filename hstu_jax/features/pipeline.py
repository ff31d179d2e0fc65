"""(config, store, seed, step) -> `HostBatch`, made ahead in a background thread.

Here: `Pipeline`, whose batches are pure functions of the step. The position is the step; nothing
else is saved. Not here: the contents of a batch (`packing.py`), the thread (`prefetch.py`) and
where a batch's shards live (`hstu_jax.training`, which passes `device_put`).
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import Literal

import numpy as np

from hstu_jax.config import sampler_schema, schema
from hstu_jax.data import event_store, sample_weights, store_files
from hstu_jax.features import (
    ablation,
    ages,
    columns,
    next_item,
    own_groups,
    packing,
    random_streams,
    samplers,
    sequence_rules,
    shapes,
    store_fit,
    window_sizes,
    windows,
)
from hstu_jax.features.batch import Batch, BatchShape
from hstu_jax.features.prefetch import HostBatch, Prefetcher


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineStats:
    """Counts of one epoch.

    Attributes:
        windows: windows, each in exactly one batch.
        queries: positives.
        tokens: slots in use, contextual ones included.
        slots: slots of all batches; tokens / slots is the share that is not padding.
        steps: batches.
        truncated_windows: windows that lost their oldest items to `max_seq_len`.
        dropped_tokens: items they lost.
        empty_histories: windows without any history item.
    """

    windows: int
    queries: int
    tokens: int
    slots: int
    steps: int
    truncated_windows: int
    dropped_tokens: int
    empty_histories: int


class Pipeline:
    """Batches of one split; `batch_at(step)` depends on (config, store, step) only.

    Args:
        config: reads `seed`, `features`, `feature_groups`, `data` and, of the model, the history
            length, the attention mask, the truncation, the objective and nothing else.
        store: the opened event store.
        split: "train", "validation" or "test".
        order: "shuffled" = a new order every epoch; "stored" = every epoch in the store's order,
            with negatives that depend neither on the seed nor on the epoch, and one request a
            window whatever the objective (evaluation).
        groups: numbers of the groups that batches are made of, ascending; None = all of them.

    Attributes:
        source: what batches are made from; with `packing.build_batch`, for windows of one's choice.

    Raises:
        ValueError: a feature has no column, ids do not fit their table, the split has no window,
            a window has more positives than a group may have, sampler weights are wrong, or
            `store_fit.check` refuses the store.
        FileNotFoundError: a path of `negative_sampler` names no file.
    """

    def __init__(
        self,
        config: schema.Config,
        store: event_store.EventStore,
        *,
        split: str = "train",
        order: Literal["shuffled", "stored"] = "shuffled",
        groups: tuple[int, ...] | None = None,
    ):
        store_fit.check(config, store)
        self._groups = groups if groups is not None else tuple(range(config.data.num_groups))
        self._config, self._store, self._order = config, store, order
        self._evaluations: dict[str, Pipeline] = {}  # made once per split: it checks all ids
        max_seq_len = config.model.user_tower.max_seq_len
        training_rows = _training_rows(config, store)
        rows = training_rows if order == "shuffled" else None
        rule = sequence_rules.mask_rule(
            config.model.user_tower.hstu.stu,
            num_contextual=config.num_contextual,
            objective=config.model.objective,
        )
        self._windows = window_sizes.split_windows(
            store,
            split=split,
            num_contextual=config.num_contextual,
            max_seq_len=max_seq_len,
            rows=rows,
            rule=rule,
        )
        self._shapes = shapes.run_shapes(
            config, store, training_rows, is_evaluation=order == "stored"
        )
        sampler, hard_sampler = samplers.build(config.data.negative_sampler, store)
        weight_fields = config.data.sample_weight_fields
        self.source = packing.BatchSource(
            store=store,
            columns=columns.resolve_columns(
                features=config.features,
                raw_features=config.raw_features,
                feature_groups=config.feature_groups,
                store=store,
            ),
            sampler=sampler,
            num_contextual=config.num_contextual,
            max_seq_len=max_seq_len,
            rule=rule,
            hard_sampler=hard_sampler,
            sample_weight=sample_weights.read_sample_weights(store, weight_fields[0])
            if weight_fields
            else None,
            tail_len=sequence_rules.tail_len(config.model.user_tower),
            periods=config.model.user_tower.hstu.timestamp_layernorm.pairs,
            rows=rows,
            step_time=next_item.step_time(config),
            has_ages=ages.are_read(config),
            excludes_group=config.data.negative_sharing == "none"
            and (rows is None or config.data.negative_sampler.exclusion == "group"),
        )
        self._schedule = windows.Schedule(
            self._windows,
            shapes=self._shapes,
            one_user_per_row=config.data.layout == "padded",
            seed=config.seed if order == "shuffled" else None,
        )

    @property
    def shapes(self) -> tuple[BatchShape, ...]:
        """Every shape that a batch of this pipeline can have; one compilation each."""
        return self._shapes

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out on reading or has no query, and missing in the features' columns."""
        rows = () if self.source.rows is None else (self.source.rows.note(),)
        return (*rows, *self._store.features.notes, *self.source.columns.notes)

    def fingerprint(self) -> str:
        """Changes with everything that batches are read from; decides who may resume.

        The data itself, and where they are configured vocabularies, the sampler's files and sample
        weights.
        """
        return self._fingerprint

    @functools.cached_property  # every checkpoint asks for it
    def _fingerprint(self) -> str:
        parts = [
            "\n".join((name, *feature.words())).encode()
            for name, feature in sorted(self._config.features.items())
            if feature.vocab_file
        ]
        sampler = self._config.data.negative_sampler
        paths = [getattr(sampler, name) for name in sampler_schema.PATHS]
        parts += [store_files.file_sha256(pathlib.Path(path)).encode() for path in paths if path]
        if self.source.sample_weight is not None:
            parts.append(np.ascontiguousarray(self.source.sample_weight).tobytes())
        digest = hashlib.sha256(self._store.fingerprint().encode())
        for part in parts:
            digest.update(part)
        return digest.hexdigest() if parts else self._store.fingerprint()

    def num_steps(self, epoch: int) -> int:
        """Batches of an epoch, from 0. Packed epochs may differ by a batch."""
        return self._schedule.plan(epoch).num_steps

    def first_step(self, epoch: int) -> int:
        """Step at which an epoch begins; `first_step(num_epochs)` = steps of `num_epochs`."""
        return self._schedule.first_step(epoch)

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, index within it) of a step."""
        return self._schedule.locate(step)

    def stats(self, epoch: int = 0) -> PipelineStats:
        """Counts of an epoch."""
        plan, split = self._schedule.plan(epoch), self._windows
        slots = [shape.groups * shape.rows * shape.row_len for shape in self._shapes]
        return PipelineStats(
            windows=len(split.windows),
            queries=int(split.num_positives.sum()),
            tokens=int(split.lengths.sum()),
            slots=int(np.array(slots)[plan.shape_index].sum()),
            steps=plan.num_steps,
            truncated_windows=int(np.count_nonzero(split.dropped_tokens)),
            dropped_tokens=int(split.dropped_tokens.sum()),
            empty_histories=int(np.count_nonzero(split.lengths == self._config.num_contextual)),
        )

    def balance_summary(self, num_devices: int) -> str:
        """One line about how even the groups and the devices are; "" with one group."""
        if self._shapes[0].groups == 1:
            return ""
        return self._schedule.plan(0).loads().line(num_devices)

    def hard_negatives_summary(self) -> str:
        """One line about the hard-edge table and this split's windows; "" without a table."""
        sampler = self.source.hard_sampler
        if sampler is None:
            return ""
        chosen = self._windows.windows
        positive_row, positive_item = packing.positives_of(self._store, chosen)
        return sampler.summary(
            chosen,
            positive_row=positive_row,
            positive_item=positive_item,
        )

    def batch_at(self, step: int) -> HostBatch:
        """The batch of a step, from 0: its `groups`. Safe to call from several threads.

        Raises:
            ValueError: `step` is negative, or a group's positives leave nothing to draw negatives
                from.
        """
        if step < 0:
            raise ValueError(f"step={step}: must not be negative; steps count from 0.")
        epoch, index = self._schedule.locate(step)
        plan = self._schedule.plan(epoch)
        shape = self._shapes[plan.shape_index[index]]
        if self._order == "shuffled":
            seed, stream, major = self._config.seed, random_streams.Stream.NEGATIVES, step
            hard_stream = random_streams.Stream.HARD_NEGATIVES
        else:
            seed, stream, major = 0, random_streams.Stream.EVAL_NEGATIVES, index
            hard_stream = random_streams.Stream.EVAL_HARD_NEGATIVES
        kind = self._config.data.ablation
        # A shuffle draws for one group after the other: it needs them all.
        takes_part = kind in ablation.SHUFFLES and len(self._groups) < shape.groups
        batch, window_index = own_groups.build(
            plan.groups(index),
            range(shape.groups) if takes_part else self._groups,
            source=self.source,
            shape=shape,
            group_rng=lambda group: random_streams.generator(
                seed=seed, stream=stream, major=major, minor=group
            ),
            hard_rng=lambda group: random_streams.generator(
                seed=seed, stream=hard_stream, major=major, minor=group
            ),
        )
        if kind != "none":
            batch = ablation.apply(
                kind,
                batch,
                num_contextual=self._config.num_contextual,
                is_training=self._order == "shuffled",
                users=np.asarray(self._store.windows.user_index)[window_index],
                rng=random_streams.generator(
                    seed=seed, stream=random_streams.Stream.ABLATION, major=major
                ),
            )
        if takes_part:
            batch = own_groups.take(batch, self._groups)
            window_index = window_index[list(self._groups)]
        return HostBatch(
            batch=batch,
            shape=shape,
            window_index=window_index,
            step=step,
            epoch=epoch,
            num_users=int(np.count_nonzero(batch.user_mask)),
            num_tokens=int(batch.segment_lengths.sum()),
            num_queries=int(np.count_nonzero(batch.query_mask)),
        )

    def iterate(
        self,
        *,
        start_step: int = 0,
        stop_step: int | None = None,
        device_put: Callable[[Batch], Batch] | None = None,
    ) -> "Prefetcher":
        """Batches of `start_step`, `start_step + 1`, ..., made ahead in a background thread.

        Args:
            start_step: first step; with it alone a stopped run goes on where it was.
            stop_step: one past the last step; None = without end.
            device_put: moves a batch to the device; called in the background thread.
        """
        make = functools.partial(_make_batch, self.batch_at, device_put)
        return Prefetcher(
            make,
            start_step=start_step,
            stop_step=stop_step,
            num_prefetch=self._config.data.num_prefetch,
        )

    def eval_batches(
        self,
        split: Literal["train", "validation", "test"],
        *,
        device_put: Callable[[Batch], Batch] | None = None,
    ) -> "Prefetcher":
        """Every window of a split once, in the store's order, with fixed negatives.

        Args:
            split: which windows.
            device_put: as in `iterate`.
        """
        if split not in self._evaluations:
            self._evaluations[split] = Pipeline(
                self._config, self._store, split=split, order="stored", groups=self._groups
            )
        pipeline = self._evaluations[split]
        return pipeline.iterate(stop_step=pipeline.num_steps(0), device_put=device_put)


def batch_shape(config: schema.Config, store: event_store.EventStore) -> BatchShape:
    """The largest shape of a training run, without making a pipeline."""
    rows = _training_rows(config, store)
    return shapes.run_shapes(config, store, rows, is_evaluation=False)[-1]


def _training_rows(
    config: schema.Config, store: event_store.EventStore
) -> next_item.TrainingRows | None:
    if config.model.objective == "window":
        return None
    return next_item.training_rows(
        store,
        num_contextual=config.num_contextual,
        max_seq_len=config.model.user_tower.max_seq_len,
    )


def _make_batch(
    batch_at: Callable[[int], HostBatch],
    device_put: Callable[[Batch], Batch] | None,
    step: int,
) -> HostBatch:
    host_batch = batch_at(step)
    if device_put is None:
        return host_batch
    return dataclasses.replace(host_batch, batch=device_put(host_batch.batch))
