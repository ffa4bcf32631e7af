"""Settings: file below environment below flags, and complaints that name the key."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from stillframe.cli.settings import KEYS, Settings, load_settings
from stillframe.engine.settings import EngineSettings
from stillframe.model.errors import InvalidRequest
from stillframe.model.scopes import SCOPES
from stillframe.model.units import GIB
from stillframe.model.values import CompressionAlgorithm, CompressionConfig, Hypervisor


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.toml"
    file.write_text(text)
    return file


def test_flags_beat_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, 'listen = "a:1"\nlog_level = "debug"\nlog_format = "json"\n')
    environment = {"STILLFRAME_CONFIG": str(file), "STILLFRAME_LISTEN": "b:2",
                   "STILLFRAME_LOG_LEVEL": "error"}  # fmt: skip
    settings = load_settings(environment=environment, flags={"listen": "c:3", "log_level": None})
    assert (settings.listen, settings.log_level, settings.log_format) == ("c:3", "error", "json")


def test_tables_of_the_file_and_their_variables(tmp_path: Path) -> None:
    file = write(tmp_path, '[limits]\nmax_memory = "4GB"\nmax_vcpus = 3\n[defaults]\nvcpus = 1\n')
    settings = load_settings(
        config=file, environment={"STILLFRAME_LIMITS_MAX_VCPUS": "5"}, flags={}
    )
    assert settings.max_memory_bytes == 4 * GIB
    assert settings.max_vcpus == 5
    assert settings.default_vcpus == 1


def test_a_quota_of_zero_is_none(tmp_path: Path) -> None:
    file = write(
        tmp_path, '[limits]\nmax_snapshot_bytes = "2GB"\nmin_free = 0\nmax_archive = "3GB"\n'
    )
    settings = load_settings(
        config=file, environment={"STILLFRAME_LIMITS_MAX_SNAPSHOTS": "7"}, flags={}
    )
    assert (settings.max_snapshot_bytes, settings.max_snapshots) == (2 * GIB, 7)
    assert settings.min_free_bytes == 0
    assert settings.max_archive_bytes == 3 * GIB
    off = {"STILLFRAME_LIMITS_MAX_SNAPSHOTS": "0"}
    assert load_settings(environment=off, flags={}).max_snapshots == 0


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[limits]\nmax_snapshots = -1", "limits.max_snapshots"),
        ("[limits]\nmax_snapshots = false", "limits.max_snapshots"),
        ("[limits]\nmax_memory = 'much'", "limits.max_memory"),
        ("[limits]\nmax_vcpus = 0", "limits.max_vcpus"),
        ("[limits]\nmax_vcpus = true", "limits.max_vcpus"),
        ("default_hypervisor = 'xen'", "default_hypervisor"),
        ("data_dir = 7", "data_dir"),
        ("metrics_listen = false", "metrics_listen"),
        ("[defaults]\ncompression = 'gzip'", "defaults.compression"),
        ("[defaults]\ncompression = 'zstd:20'", "defaults.compression"),
        ("[defaults]\ncompression = 'lz4:x'", "defaults.compression"),
        ("[defaults]\ncompression = true", "defaults.compression"),
        ("[limits]\nmax_disks = 7", "limits.max_disks"),
    ],
)
def test_a_bad_value_is_named_with_its_file(tmp_path: Path, text: str, key: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(InvalidRequest) as caught:
        load_settings(config=file, environment={}, flags={})
    assert key in caught.value.message
    assert str(file) in caught.value.message


def test_a_bad_variable_is_named() -> None:
    with pytest.raises(InvalidRequest, match="STILLFRAME_ACCELERATOR"):
        load_settings(environment={"STILLFRAME_ACCELERATOR": "warp"}, flags={})


def test_a_missing_file_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot read"):
        load_settings(config=tmp_path / "none.toml", environment={}, flags={})


def test_broken_toml_says_where(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="line 1"):
        load_settings(config=write(tmp_path, "listen = = 1"), environment={}, flags={})


def test_the_metrics_listener_is_off_unless_it_has_an_address(tmp_path: Path) -> None:
    assert load_settings(environment={}, flags={}).metrics_listen == ""
    file = write(tmp_path, 'metrics_listen = "127.0.0.1:9464"\n')
    assert load_settings(config=file, environment={}).metrics_listen == "127.0.0.1:9464"
    off = load_settings(config=file, environment={}, flags={"metrics_listen": ""})
    assert off.metrics_listen == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("off", None),
        ("zstd", CompressionConfig(True, CompressionAlgorithm.ZSTD, 1)),
        ("zstd:3", CompressionConfig(True, CompressionAlgorithm.ZSTD, 3)),
        ("lz4", CompressionConfig(True, CompressionAlgorithm.LZ4, 0)),
        ("lz4:9", CompressionConfig(True, CompressionAlgorithm.LZ4, 9)),
    ],
)
def test_compression_is_off_or_an_algorithm_with_a_level(
    text: str, expected: CompressionConfig | None
) -> None:
    assert load_settings(environment={}, flags={}).default_compression is None
    environment = {"STILLFRAME_DEFAULTS_COMPRESSION": text}
    assert load_settings(environment=environment, flags={}).default_compression == expected


def test_paths_come_as_texts_and_as_paths(tmp_path: Path) -> None:
    settings = load_settings(environment={}, flags={"data_dir": tmp_path})
    assert settings.data_dir == tmp_path
    settings = load_settings(environment={"STILLFRAME_DATA_DIR": "~/vms"}, flags={})
    assert settings.data_dir == Path.home() / "vms"


def test_an_installed_kernel_is_preferred_to_the_source_tree(tmp_path: Path) -> None:
    (tmp_path / "stillframe/kernel").mkdir(parents=True)
    settings = load_settings(environment={"XDG_DATA_HOME": str(tmp_path)}, flags={})
    assert settings.kernel_dir == tmp_path / "stillframe/kernel"


def test_every_key_has_a_field_and_every_field_a_key() -> None:
    assert {field for field, _ in KEYS.values()} == set(Settings.__dataclass_fields__)


def test_the_contracts_defaults() -> None:
    settings = load_settings(environment={}, flags={})
    assert settings.default_memory_bytes == 1 * GIB
    assert settings.default_overlay_bytes == 10 * GIB
    assert (settings.default_vcpus, settings.max_vcpus) == (2, 16)
    assert settings.default_hypervisor is Hypervisor.QEMU


def test_the_engine_alone_has_the_same_defaults() -> None:
    ours, engines = (
        {field.name: field.default for field in fields(kind) if field.default is not MISSING}
        for kind in (Settings, EngineSettings)
    )
    both = ours.keys() & engines.keys()
    assert {"max_memory_bytes", "min_free_bytes", "accelerator"} <= both
    assert {name: ours[name] for name in both} == {name: engines[name] for name in both}


def test_every_setting_and_kind_of_scope_is_documented() -> None:
    operating = (Path(__file__).resolve().parents[2] / "docs/operating.md").read_text()
    assert [key for key in KEYS if f"`{key}`" not in operating] == []
    kinds = {scope.partition(":")[0] for scope in SCOPES}
    assert [kind for kind in sorted(kinds) if f"`{kind}" not in operating] == []
