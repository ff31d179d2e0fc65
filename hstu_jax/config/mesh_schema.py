"""The devices of a run in the configuration, and what moves between them.

What the fields do is in `hstu_jax/training/partition.py` and `hstu_jax/tables/exchange.py`.
"""

import dataclasses
from typing import Literal

from hstu_jax.config.checks import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices of the mesh; -1 = all that are left, both -1 = a host for every process.

    A device has room to send `exchange_slack` times as many ids as it can have (an even share to
    every other device); ids beyond wait for another round. With several hosts of several chips that
    is the room within a host, and `host_exchange_slack` the room between hosts, where ids that the
    chips of a host share go once. With one chip a host, or one host, there is one level, and
    `exchange_slack` is its room, between hosts too. Embedding tables of at most
    `replicated_table_bytes` are whole on every device, larger ones split over all; 0 splits all.
    `exchange` says what of that room is sent: all of it ("padded"), the filled places only
    ("ragged"), or by the devices ("auto": filled places on TPUs, for tables whose width is a
    multiple of 128, else all). These four change time and memory, no result.
    """

    host: int = 1
    chip: int = -1
    exchange_slack: float = 1.25
    host_exchange_slack: float = 1.25
    replicated_table_bytes: int = 262_144
    exchange: Literal["auto", "padded", "ragged"] = "auto"

    def __post_init__(self):
        for name in ("host", "chip"):
            value = getattr(self, name)
            require(value == -1 or value > 0, name, value, "must be positive, or -1 for the rest")
        for name in ("exchange_slack", "host_exchange_slack"):
            require(
                0 < getattr(self, name) < float("inf"),
                name,
                getattr(self, name),
                "must be a positive number",
                "1.25 leaves a quarter of room for ids that are not spread evenly",
            )
        require(
            1 not in (self.host, self.chip) or self.host_exchange_slack == 1.25,
            "host_exchange_slack",
            self.host_exchange_slack,
            f"has no effect with host={self.host} and chip={self.chip}",
            "leave it at 1.25, or set both above 1",
        )
        require(
            self.replicated_table_bytes >= 0,
            "replicated_table_bytes",
            self.replicated_table_bytes,
            "must not be negative",
            "0 splits every table",
        )
