"""The source of a user's own classes as a digest, so that nothing that an earlier version of them made is reused.

What counts is the module of a class, those of its bases, and the modules beside them that these import, at the top or
within a function: of the same package, or in the same folder. Installed libraries and the standard library do not. Only
import statements are followed: for `importlib.import_module`, and for data files, a class has to give a `digest`.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec, resolve_name
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

# Not the user's code even where they are installed from a working copy.
LIBRARIES = {"torch", "transformers", "lightning", "pytorch_lightning", __name__.partition(".")[0]}


def code_digest(owner: Any, *others: Any) -> str | None:
    """A digest of the code that a class of the user's runs.

    Args:
        owner: the class. A `digest` of its own, a string that is the same for all of its objects, stands for all code.
        others: classes whose code runs too, such as the modules of a model.

    Returns:
        None where the code cannot be known: the class was made in a notebook or at a prompt, is compiled, or its file
        was edited after it was imported. The last is seen by the functions, not by a constant alone.
    """
    given = inspect.getattr_static(owner, "digest", None)
    if isinstance(given, str):
        return given
    own = _homes(owner)[0]
    homes = {own, *(name for kind in (owner, *others) for name in _homes(kind) if _is_users(name, _top(own)))}
    sources = _sources(homes)
    if sources is None:
        return None
    each = [f"{name} {hashlib.sha256(content).hexdigest()}" for name, content in sorted(sources.items())]
    return hashlib.sha256("\n".join(each).encode()).hexdigest()


def class_name(owner: Any) -> str:
    """Module and name of a class or function, for digests and messages: of the program's own, its file's name."""
    module = owner.__module__
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    home = Path(script).stem if module == "__main__" and script else module
    return f"{home}.{getattr(owner, '__qualname__', owner)}"


def no_reuse(owner: Any, what: str) -> str:
    """What to tell the user where `code_digest` is None; `what` is made anew each time."""
    name = getattr(owner, "__qualname__", owner)
    why = "its source cannot be read, or was edited after it was imported"
    return f"{name}: {why}, so {what} anew each time; give the class a digest, a string to change with its code"


def _sources(homes: set[str]) -> dict[str, bytes] | None:
    """The files of `homes` and of the user's modules that these import; None where a module of `homes` has no file."""
    tops = {_top(name) for name in homes}
    folders = {root for root in map(_root, tops) if root is not None and not _is_installed(root)}
    sources: dict[str, bytes] = {}
    waiting = sorted(homes)
    while waiting:
        name = waiting.pop()
        if name in sources:
            continue
        file, content = _read(name)
        has_source = file is not None and file.suffix == ".py"
        if (name in homes and not has_source) or (has_source and not _is_as_loaded(_loaded(name), content)):
            return None
        if file is not None:
            sources[name] = content
        found = _imports(name, file, content) if file is not None and has_source else set()
        waiting += [other for other in found if _top(other) in tops or _root(_top(other)) in folders]
    return sources


def _homes(owner: Any) -> list[str]:
    """The modules of a class and of its bases, its own first."""
    if isinstance(owner, ModuleType):
        return [owner.__name__]
    line = owner.__mro__ if isinstance(owner, type) else (owner, *type(owner).__mro__)
    names = [str(getattr(kind, "__module__", None)) for kind in line]
    main = getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", "__main__")
    return [main if name == "__main__" else name for name in names]


def _top(name: str) -> str:
    return name.partition(".")[0]


def _is_users(name: str, own: str) -> bool:
    """Whether the module of a class is the user's: of the same package as their own, or of no library."""
    top = _top(name)
    if top == own:
        return True
    root = _root(top)
    return top not in LIBRARIES and top not in sys.stdlib_module_names and not (root and _is_installed(root))


def _is_installed(folder: Path) -> bool:
    return not {"site-packages", "dist-packages"}.isdisjoint(folder.parts)


def _root(top: str) -> Path | None:
    """The folder that a top-level module or package lies in; None for a library's that need not be looked for."""
    if top in LIBRARIES or top in sys.stdlib_module_names:
        return None
    file, inner = _locate(top)
    if inner:
        return Path(inner[0]).parent
    return file.parent if file else None


def _loaded(name: str) -> ModuleType | None:
    """The module of that name, if it is imported; the program's own may be, under another name."""
    main = sys.modules.get("__main__")
    is_main = getattr(getattr(main, "__spec__", None), "name", None) == name
    return sys.modules.get(name) or (main if is_main else None)


def _locate(name: str) -> tuple[Path | None, list[str]]:
    """A module's file, and the folders of a package's modules, without importing anything."""
    module = _loaded(name)
    parent, _, last = name.rpartition(".")
    if module is not None:
        file = getattr(module, "__file__", None)
        prompt = name == "__main__" and hasattr(sys, "ps1")  # what is typed there stands in no file
        return Path(file) if file and not prompt else None, [str(folder) for folder in getattr(module, "__path__", [])]
    if not parent:
        try:
            spec = find_spec(name)
        except (ImportError, ValueError, AttributeError):
            spec = None
        file = spec.origin if spec is not None and spec.has_location else None
        return Path(file) if file else None, list(spec.submodule_search_locations or []) if spec is not None else []
    inside = [Path(folder) / last for folder in _locate(parent)[1]]
    for place in inside:
        if (place / "__init__.py").is_file():
            return place / "__init__.py", [str(place)]
        if place.with_name(f"{last}.py").is_file():
            return place.with_name(f"{last}.py"), []
    return None, [str(place) for place in inside if place.is_dir()]  # a namespace package, or no module at all


def _read(name: str) -> tuple[Path | None, bytes]:
    file, _ = _locate(name)
    try:
        return file, file.read_bytes() if file is not None else b""
    except OSError:
        return None, b""


def _imports(name: str, file: Path, content: bytes) -> set[str]:
    """The names that a module imports, and the packages that they are in; some may be no modules."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return set()
    module = _loaded(name)
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    package = getattr(module, "__package__", None) or package
    found = {name}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            try:
                base = resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:  # beyond the package: it fails where it is run, too
                continue
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    parts = [name.split(".") for name in found]
    return {".".join(some[:end]) for some in parts for end in range(1, len(some) + 1)}


def _is_as_loaded(module: ModuleType | None, content: bytes) -> bool:
    """Whether the functions of an imported module are as in its file; true for a loader that rewrites code."""
    if module is None or type(getattr(module, "__loader__", None)) is not SourceFileLoader:
        return True
    file = str(module.__file__)
    try:
        known = set(_codes(compile(content, file, "exec", dont_inherit=True)))
    except (SyntaxError, ValueError):
        return False
    return all(code in known for code in _functions(vars(module), module.__name__) if code.co_filename == file)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _functions(names: Mapping[str, Any], home: str) -> Iterator[CodeType]:
    """The code of the functions among the attributes of a module, or of a class of it."""
    for value in names.values():
        if isinstance(value, type) and value.__module__ == home and value.__dict__ is not names:
            yield from _functions(vars(value), home)
        bare = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
        bare = inspect.unwrap(bare) if isinstance(bare, FunctionType) else bare
        if isinstance(bare, FunctionType):
            yield bare.__code__
