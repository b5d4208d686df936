"""The section `ray` of the configuration: the processes that Ray starts for `engine: ray`."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.fields import check_values, key, require

ENGINES = ("local", "ray")


@dataclass
class Ray:
    """What `engine: ray` asks of Ray. The cluster is the one that `RAY_ADDRESS` names, or else this machine."""

    workers: int | None = key("most worker processes at once; null: as many as there is room for", least=1)
    threads: int | None = key("threads, and so processors, of each; null: as many threads as this process has", least=1)
    gpus: float | None = key(
        "GPUs of each, or the part of one; null: one where the cluster has any and `device` is not `cpu`"
    )

    def check(self) -> None:
        """Raises ConfigError for a value that is out of range."""
        check_values(self, "ray.")
        whole = self.gpus is None or (self.gpus >= 0 and (self.gpus <= 1 or self.gpus == int(self.gpus)))
        require(whole, f"ray.gpus is {self.gpus}, expected a part of one, such as 0.5, or a whole number")


def check_device(device: str) -> None:
    """Raises ConfigError for a device that Ray cannot choose."""
    plain = ":" not in device
    require(
        plain, f"device: engine ray gives each worker a GPU of its own; expected auto, cuda or cpu, found '{device}'"
    )
