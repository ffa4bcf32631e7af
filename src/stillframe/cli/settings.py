"""Settings: a TOML file, overridden by STILLFRAME_* variables, overridden by flags.

``KEYS`` is the whole list. A key ``limits.max_memory`` is ``max_memory`` in the table ``[limits]``
of the file and ``STILLFRAME_LIMITS_MAX_MEMORY`` in the environment. Every complaint names the key
and where it stood.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillframe.model.errors import InvalidRequest, StillframeError
from stillframe.model.units import GIB, MIB, parse_size
from stillframe.model.values import (
    COMPRESSION_LEVELS,
    CompressionAlgorithm,
    CompressionConfig,
    Hypervisor,
)

DEFAULT_LISTEN = "127.0.0.1:4973"
_TRACKER = "libstillframe-tracker.so"
_SOURCE_TREE = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings, checked. Sizes are bytes; a quota of 0 is none.

    ``kernel_dir``, ``agent_binary`` and ``tracker_library`` are where they were found, or where
    they are looked for first when they are nowhere. An empty ``metrics_listen`` turns that
    listener off.
    """

    data_dir: Path
    kernel_dir: Path
    agent_binary: Path
    tracker_library: Path
    listen: str = DEFAULT_LISTEN
    metrics_listen: str = ""
    default_hypervisor: Hypervisor = Hypervisor.QEMU
    qemu_binary: str = "qemu-system-x86_64"
    firecracker_binary: str = "firecracker"
    cloud_hypervisor_binary: str = "cloud-hypervisor"
    accelerator: str = "auto"
    log_format: str = "plain"
    log_level: str = "info"
    max_vcpus: int = 16
    max_memory_bytes: int = 32 * GIB
    max_overlay_bytes: int = 100 * GIB
    default_memory_bytes: int = 1 * GIB
    default_vcpus: int = 2
    default_overlay_bytes: int = 10 * GIB
    default_compression: CompressionConfig | None = None
    max_concurrent_starts: int = 8
    warm_memory_bytes: int = 2 * GIB
    capture_buffer_bytes: int = 512 * MIB
    max_snapshots: int = 0
    max_snapshot_bytes: int = 0
    min_free_bytes: int = 256 * MIB
    max_archive_bytes: int = 256 * GIB
    max_log_bytes: int = 50 * MIB

    @property
    def programs_dir(self) -> Path:
        """Where ``stillframe setup`` installs hypervisors, and the server looks after PATH."""
        return self.data_dir / "programs"


def _text(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise InvalidRequest("must be a non-empty text")


def _text_or_nothing(value: Any) -> str:
    return "" if value == "" else _text(value)


def _path(value: Any) -> Path:
    return Path(_text(str(value) if isinstance(value, Path) else value)).expanduser().absolute()


def _count(value: Any) -> int:
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31:
        return value
    raise InvalidRequest("must be a whole number above zero")


def _size(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return parse_size(_text(value))


def _count_or_none(value: Any) -> int:
    return 0 if str(value).strip() == "0" else _count(value)


def _size_or_none(value: Any) -> int:
    return 0 if str(value).strip() == "0" else _size(value)


def _one_of(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value in choices:
            return str(value)
        raise InvalidRequest(f"must be one of {', '.join(choices)}")

    return parse


def _hypervisor(value: Any) -> Hypervisor:
    return Hypervisor(_one_of(*Hypervisor)(value))


def _compression(value: Any) -> CompressionConfig | None:
    if value == "off":
        return None
    name, _, level = _text(value).partition(":")
    if name not in list(CompressionAlgorithm):
        raise InvalidRequest("must be off, zstd or lz4, with a level as in zstd:3 if you like")
    algorithm = CompressionAlgorithm(name)
    lowest, highest, default = COMPRESSION_LEVELS[algorithm]
    if level and not (level.isdecimal() and lowest <= int(level) <= highest):
        raise InvalidRequest(f"{name} has levels {lowest} to {highest}")
    return CompressionConfig(True, algorithm, int(level) if level else default)


# Key path -> (field of Settings, parser of the raw value).
KEYS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "data_dir": ("data_dir", _path),
    "listen": ("listen", _text),
    "metrics_listen": ("metrics_listen", _text_or_nothing),
    "default_hypervisor": ("default_hypervisor", _hypervisor),
    "qemu_binary": ("qemu_binary", _text),
    "firecracker_binary": ("firecracker_binary", _text),
    "cloud_hypervisor_binary": ("cloud_hypervisor_binary", _text),
    "accelerator": ("accelerator", _one_of("auto", "kvm", "tcg")),
    "kernel_dir": ("kernel_dir", _path),
    "agent_binary": ("agent_binary", _path),
    "tracker_library": ("tracker_library", _path),
    "log_format": ("log_format", _one_of("plain", "json")),
    "log_level": ("log_level", _one_of("debug", "info", "warning", "error")),
    "max_concurrent_starts": ("max_concurrent_starts", _count),
    "limits.max_vcpus": ("max_vcpus", _count),
    "limits.max_memory": ("max_memory_bytes", _size),
    "limits.max_overlay": ("max_overlay_bytes", _size),
    "limits.warm_memory": ("warm_memory_bytes", _size),
    "limits.capture_buffer": ("capture_buffer_bytes", _size),
    "limits.max_snapshots": ("max_snapshots", _count_or_none),
    "limits.max_snapshot_bytes": ("max_snapshot_bytes", _size_or_none),
    "limits.min_free": ("min_free_bytes", _size_or_none),
    "limits.max_archive": ("max_archive_bytes", _size),
    "limits.max_log": ("max_log_bytes", _size),
    "defaults.memory": ("default_memory_bytes", _size),
    "defaults.vcpus": ("default_vcpus", _count),
    "defaults.overlay": ("default_overlay_bytes", _size),
    "defaults.compression": ("default_compression", _compression),
}


def load_settings(
    *,
    config: Path | None = None,
    flags: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Put file, environment and flags together (flags by key path; None means not given).

    Raises InvalidRequest naming the key and its source for an unknown key or a bad value, or
    when a file that was asked for cannot be read.
    """
    environment = os.environ if environment is None else environment
    chosen: dict[str, Any] = {
        "data_dir": default_data_dir(environment),
        "kernel_dir": _find("kernel", ".cache/kernel", environment),
        "agent_binary": _find("stillframe-init", "agent/build/stillframe-init", environment),
        "tracker_library": _find(_TRACKER, f"tracker/build/{_TRACKER}", environment),
    }
    for source, values in _sources(config, flags or {}, environment):
        for key, value in values.items():
            if key not in KEYS:
                raise InvalidRequest(
                    f"unknown setting {key!r} in {source}", hint=f"known are {', '.join(KEYS)}"
                )
            field, parse = KEYS[key]
            try:
                chosen[field] = parse(value)
            except StillframeError as error:
                raise InvalidRequest(
                    f"setting {key} in {source}: {error.message}", hint=error.hint, key=key
                ) from error
    return Settings(**chosen)


def default_data_dir(environment: Mapping[str, str]) -> Path:
    """``/var/lib/stillframe`` for root, else ``$XDG_DATA_HOME/stillframe/data``."""
    if os.geteuid() == 0:
        return Path("/var/lib/stillframe")
    return _data_home(environment) / "data"


def _sources(
    config: Path | None, flags: Mapping[str, object], environment: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    file = _config_file(config, environment)
    if file is not None:
        yield str(file), dict(_flatten(_read_toml(file)))
    names = {f"STILLFRAME_{key.replace('.', '_').upper()}": key for key in KEYS}
    for name, key in names.items():
        if environment.get(name):
            yield name, {key: environment[name]}
    yield "the command line", {k: v for k, v in flags.items() if v is not None}


def _config_file(config: Path | None, environment: Mapping[str, str]) -> Path | None:
    if config is not None:
        return config
    if named := environment.get("STILLFRAME_CONFIG"):
        return Path(named)
    home = Path(environment.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    for candidate in (Path("/etc/stillframe/config.toml"), home / "stillframe/config.toml"):
        if candidate.is_file():
            return candidate
    return None


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"cannot read {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{file} is not valid TOML: {error}") from error


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _data_home(environment: Mapping[str, str]) -> Path:
    home = environment.get("XDG_DATA_HOME") or Path.home() / ".local/share"
    return Path(home) / "stillframe"


def _find(installed: str, in_source_tree: str, environment: Mapping[str, str]) -> Path:
    candidates = [_data_home(environment) / installed, Path("/usr/share/stillframe") / installed]
    if (_SOURCE_TREE / "pyproject.toml").is_file():
        candidates.append(_SOURCE_TREE / in_source_tree)
    return next((path for path in candidates if path.exists()), candidates[-1])
