"""A YAML file that inherits, composed as Hydra does it: `defaults`, groups, packages and `hydra.searchpath`.

Hydra's own `compose` is not called. It replaces the state of a program under `@hydra.main`, needs the plugins that the
training is launched with, and runs resolvers in values that another file overrides. Here Hydra's state stays as it is,
and nothing that a file names is imported; resolvers are run in the `defaults` list, the search path and the section.

This needs parts of Hydra that are not public; all are used here, and listed in `tests/test_hydra_file.py`.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.core_plugins.structured_config_source import StructuredConfigSource
from hydra._internal.defaults_list import create_defaults_list
from hydra.errors import MissingConfigException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.errors import ConfigError

# Hydra's own groups: how to launch, log and sweep a training. Hydra's plugins need not be installed.
OF_HYDRA = re.compile(r"((optional|override)\s+)*/?hydra/")


def compose(path: Path, root: DictConfig) -> tuple[DictConfig, list[tuple[str, str, str]]]:
    """The configuration of a file with a `defaults` list.

    Only the search path is resolved. A relative one begins at the current folder, or else at the file's; `pkg://` is
    the folder of an installed package, which is not imported.

    Args:
        path: the file, whose name ends in `.yaml`.
        root: its content.

    Returns:
        The composed configuration; and the name, package and text of each file in it: the first overrides the others.

    Raises:
        ConfigError: a file of the list cannot be found or read, or Hydra refuses the list.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path}: expected a name that ends in .yaml, as Hydra composes no other; rename the file")
    folders = [path.parent, *_search_path(path, root)]
    repository = _Repository(folders)
    try:
        with _undisturbed():
            defaults = create_defaults_list(repository, path.name, [], prepend_hydra=False, skip_missing=False).defaults
            loader = ConfigLoaderImpl(ConfigSearchPathImpl())
            composed = loader._compose_config_from_defaults_list(defaults, repository)
    except ConfigError:
        raise
    except MissingConfigException as error:
        what = str(error).partition("Config search path:")[0].strip()
        looked = ", ".join(f"'{folder}'{'' if folder.is_dir() else ' (no such folder)'}" for folder in folders)
        remedy = "add the file, or name its folder in hydra.searchpath"
        raise ConfigError(f"{path}: {what} Looked in {looked}; {remedy}") from error
    except Exception as error:  # Hydra raises errors of many kinds for a malformed list
        remedy = "put the defaults list right; overrides are applied after it"
        raise ConfigError(f"{path}: cannot be composed: {error}; {remedy}") from error
    plain = _mapped(OmegaConf.to_container(composed, resolve=False), lambda text: repository.kept.get(text, text))
    parts = [(str(default.config_path), default.package or "") for default in reversed(defaults)]
    texts = repository.texts
    return OmegaConf.create(plain), [
        (texts[name][0], package, texts[name][1]) for name, package in parts if name in texts
    ]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hides Hydra's warnings, which are for the author of the files, and puts Hydra's `version_base` back."""
    base = VersionBase.instance()
    before = base.version_base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            base.version_base = before


def _search_path(path: Path, root: DictConfig) -> list[Path]:
    """The folders of `hydra.searchpath`; Hydra skips a folder that does not exist."""
    try:
        found = OmegaConf.select(root, "hydra.searchpath")
        found = OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: hydra.searchpath cannot be resolved: {error}; set what it names") from error
    found = [] if found is None else found
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise ConfigError(f"{path}: hydra.searchpath: expected a list of folders, found {found!r}")
    return [_folder(path, entry) for entry in found]


def _folder(path: Path, entry: str) -> Path:
    scheme, _, name = entry.rpartition("://")
    if scheme not in ("", "file", "pkg"):
        raise ConfigError(f"{path}: hydra.searchpath: expected file://FOLDER or pkg://PACKAGE, found '{entry}'")
    folder = Path(name)
    if scheme == "pkg":
        top, *inner = re.split(r"[./]", name)
        spec = importlib.util.find_spec(top) if top.isidentifier() and top != "__main__" else None
        places = spec.submodule_search_locations if spec else None
        return Path(next(iter(places)), *inner) if places else folder
    return folder if folder.is_dir() else path.parent / folder


class _Repository(ConfigRepository):
    """The files of some folders, each read once, and the schemas that the program has registered.

    Attributes:
        texts: file name and text of each configuration that was read.
        kept: the strings that may hold a resolver, by the interpolation that replaces each until all is merged.
    """

    def __init__(self, folders: list[Path]) -> None:
        self.texts: dict[str, tuple[str, str]] = {}
        self.kept: dict[str, str] = {}
        self.sources = [
            *(_Folder(folder, self) for folder in folders),
            StructuredConfigSource("schema", "structured://"),
        ]
        self._loaded: dict[str, ConfigResult | None] = {}

    def load_config(self, config_path: str) -> ConfigResult | None:
        if config_path not in self._loaded:
            self._loaded[config_path] = super().load_config(config_path)
        return self._loaded[config_path]

    def keep(self, text: str) -> str:
        """An interpolation to merge in place of a text with a resolver, which merging would run."""
        if "${" not in text or ":" not in text:
            return text
        name = f"${{_kept_.{len(self.kept)}}}"
        self.kept[name] = text
        return name


class _Folder(FileConfigSource):
    """A folder of the search path."""

    def __init__(self, folder: Path, repository: _Repository) -> None:
        super().__init__("file", f"file://{folder}")
        self.repository = repository

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path, self._normalize_file_name(config_path))
        try:
            text = file.read_text(encoding="utf-8")
            plain = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{file}: not valid YAML: {error}") from error
        if not isinstance(plain, dict):
            raise ConfigError(f"{file}: expected a mapping, found {type(plain).__name__}")
        defaults = plain.pop("defaults", None)
        plain = _mapped(plain, self.repository.keep)
        if defaults is not None:
            plain["defaults"] = _without_hydra(defaults)
        self.repository.texts[config_path] = (str(file), text)
        header = ConfigSource._get_header_dict(text[:512])
        return ConfigResult(self.provider, self.full_path(), OmegaConf.create(plain), header)


def _without_hydra(defaults: Any) -> Any:
    """A defaults list without Hydra's own groups."""
    if not isinstance(defaults, list):
        return defaults
    names = [next(iter(entry), "") if isinstance(entry, dict) else entry for entry in defaults]
    return [entry for entry, name in zip(defaults, names, strict=True) if not OF_HYDRA.match(str(name))]


def _mapped(node: Any, change: Callable[[str], str]) -> Any:
    """Plain content with `change` applied to each string in it, but not to keys."""
    if isinstance(node, dict):
        return {key: _mapped(value, change) for key, value in node.items()}
    if isinstance(node, list):
        return [_mapped(value, change) for value in node]
    return change(node) if isinstance(node, str) else node
