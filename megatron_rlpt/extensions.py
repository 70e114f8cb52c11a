"""Classes from outside of the package, named in the configuration as ``module:Class`` or ``path/file.py:Class``.

An objective, a judge, a reward or a data source of the user's is loaded and checked here when the configuration is
read, so that a mistake in it is one line at the start and not a traceback in the middle of a run. The SHA-256 of the
source file identifies what a run has learned with; it goes into checkpoints (``config/loading.py: flatten``).

Only the standard library is imported here, and a user's module should import torch inside of its methods: ``rlpt plan``
and a login node read the facts of a class without torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_rlpt.errors import ConfigError, first_line


@dataclass(frozen=True)
class Extension:
    """A class that was loaded by its name."""

    key: str
    """Configuration key that names it."""
    name: str
    """As it is configured."""
    cls: Any
    file: Path
    sha256: str
    """Of the bytes that the class was made from."""

    @property
    def version(self) -> str:
        """``version`` of the class, if it has one."""
        return str(getattr(self.cls, "version", ""))

    def problem(self, text: str) -> ConfigError:
        """An error that names the key and the class."""
        return ConfigError(f"{self.key} is {self.name}, {text}")


_LOADED: dict[tuple[str, str], Extension] = {}
"""(Working directory, name) -> extension. A process keeps what it has loaded, whatever becomes of the file."""


def is_extension(name: str) -> bool:
    """Whether ``name`` is that of a class outside of the package."""
    return ":" in name


def class_name(name: str) -> str:
    """The class in ``module:Class``: the same wherever the file lies."""
    return name.rpartition(":")[2]


def forget() -> None:
    """Load every class anew the next time."""
    _LOADED.clear()


def load_extension(key: str, name: str) -> Extension:
    """Load the class that ``name`` names.

    Args:
        key: configuration key, for errors.
        name: ``module:Class``, importable from the working directory or PYTHONPATH, or ``path/file.py:Class``.

    Raises:
        ConfigError: no such file, module or class, or it raises when it is imported.
    """
    known = (os.getcwd(), name)
    if known not in _LOADED:
        _LOADED[known] = _load(key, name)
    return _LOADED[known]


def require_methods(extension: Extension, methods: Mapping[str, int], *, coroutines: Collection[str] = ()) -> None:
    """Check that a class has ``methods``.

    Args:
        extension: the class.
        methods: name -> number of positional arguments that it is called with.
        coroutines: those that have to be ``async def``.

    Raises:
        ConfigError: names the first one that is missing or cannot be called like that.
    """
    for name, count in methods.items():
        method = getattr(extension.cls, name, None)
        if not callable(method):
            raise extension.problem(f"which has no method {name}; it needs {', '.join(methods)}")
        try:
            inspect.signature(method).bind(None, *range(count))
        except (TypeError, ValueError):
            raise extension.problem(
                f"whose method {name} does not take {count} argument{'s' * (count != 1)} besides self"
            ) from None
        if (name in coroutines) != inspect.iscoroutinefunction(method):
            needed = "has to be async def" if name in coroutines else "must not be async def"
            raise extension.problem(f"whose method {name} {needed}")


def has_plain_method(extension: Extension, plain: str, asking: str) -> bool:
    """Whether a class has the method ``plain`` and not ``asking``; both are given with their arguments."""
    return hasattr(extension.cls, _method(plain)) and not hasattr(extension.cls, _method(asking))


def load_plain_or_asking(key: str, name: str, plain: str, asking: str, facts: type) -> Extension:
    """Load a class with one of two interfaces: a plain method, or a coroutine that may ask the teacher, with facts.

    Args:
        key: configuration key, for errors.
        name: see ``load_extension``.
        plain: the plain method with its two arguments, as ``reward(prefix, candidates)``.
        asking: the coroutine with its two arguments, as ``judge_group(group, ask)``.
        facts: class of the attribute ``facts`` that comes with the coroutine.

    Raises:
        ConfigError: it cannot be loaded, or has neither as it should be.
    """
    extension = load_extension(key, name)
    if has_plain_method(extension, plain, asking):
        require_methods(extension, {_method(plain): 2})
        return extension
    if not hasattr(extension.cls, _method(asking)):
        raise extension.problem(f"which has neither a method {plain} nor async {asking}")
    require_methods(extension, {_method(asking): 2}, coroutines=(_method(asking),))
    require_facts(extension, facts)
    return extension


def _method(signature: str) -> str:
    return signature.partition("(")[0]


def require_facts(extension: Extension, kind: type) -> None:
    """Check that the class attribute ``facts`` is a ``kind``.

    Raises:
        ConfigError: it is missing or something else.
    """
    facts = getattr(extension.cls, "facts", None)
    if not isinstance(facts, kind):
        found = "no facts" if facts is None else f"facts of type {type(facts).__name__}"
        raise extension.problem(f"which has {found}; it needs the class attribute facts = {kind.__name__}(...)")


def require_options(
    cls: type, name: str, options_key: str, options: Mapping[str, Any], given: Collection[str] = ()
) -> None:
    """Check ``options`` against the constructor of ``cls``.

    Args:
        cls: the class.
        name: of the class, for errors.
        options_key: configuration key of the options.
        options: keyword arguments by name.
        given: arguments that the package passes to a constructor that takes them.

    Raises:
        ConfigError: an option is unknown, or one without a default is missing.
    """
    parameters = _parameters(cls)
    free = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    takes = [one for one, kind in parameters.items() if kind.kind in _NAMED and one not in given]
    for option in options:
        if option in given or (option not in takes and not free):
            listed = f"its options are {', '.join(takes)}" if takes else "it has no options"
            raise ConfigError(f"{options_key}.{option} is no option of {name}; {listed}")
    missing = [one for one in takes if parameters[one].default is inspect.Parameter.empty and one not in options]
    if missing:
        raise ConfigError(f"{options_key} lacks {', '.join(missing)}, which {name} has no default for")


def construct(
    cls: Any, name: str, options_key: str, options: Mapping[str, Any], given: Mapping[str, Callable[[], Any]]
) -> Any:
    """Build an instance with its options, and with those of ``given`` that its constructor names.

    Raises:
        ConfigError: the options do not fit, or the constructor raises.
    """
    require_options(cls, name, options_key, options, given)
    parameters = _parameters(cls)
    arguments = {one: make() for one, make in given.items() if one in parameters}
    try:
        return cls(**arguments, **options)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{name} cannot be built with {options_key} = {dict(options)} ({describe_error(error)})"
        ) from error


def describe_error(error: BaseException) -> str:
    """Describe an exception of a user's class in one line, with the line of its file that led to it."""
    files = {str(extension.file) for extension in _LOADED.values()}
    where, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file in files:
            where = f", line {trace.tb_lineno} of {Path(file).name}"
        trace = trace.tb_next
    said = first_line(error)
    return type(error).__name__ + (f": {said}" if said != type(error).__name__ else "") + where


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _parameters(cls: Any) -> Mapping[str, inspect.Parameter]:
    if cls.__init__ is object.__init__:  # its signature is that of anything
        return {}
    return inspect.signature(cls).parameters


def _load(key: str, name: str) -> Extension:
    where, _, attribute = name.rpartition(":")
    if not where or not attribute.isidentifier():
        raise ConfigError(f"{key} is {name!r}; allowed: module:Class or path/file.py:Class")
    if where.endswith(".py"):
        file = Path(where).resolve()
        if not file.is_file():
            raise ConfigError(f"{key} is {name}, and {file} does not exist; correct the path")
        digest = hashlib.sha256(os.fsencode(file)).hexdigest()[:16]
        spec = importlib.util.spec_from_file_location(f"rlpt_extension_{digest}", file)
        assert spec is not None
    else:
        spec = _find(key, name, where)
        file = Path(str(spec.origin))
    try:
        source = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key} is {name}, and {file} cannot be read ({error.strerror})") from None
    module = _execute(key, name, spec, file, source)
    cls = getattr(module, attribute, None)
    if not inspect.isclass(cls):
        found = "no class of that name" if cls is None else f"a {type(cls).__name__} of that name, not a class"
        raise ConfigError(f"{key} is {name}, and {file} has {found}")
    return Extension(key, name, cls, file, hashlib.sha256(source).hexdigest())


def _find(key: str, name: str, module: str) -> ModuleSpec:
    # Last, so that nothing in the working directory hides a package that is installed.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # what the packages around it raise
        raise ConfigError(f"{key} is {name}, which cannot be imported ({describe_error(error)})") from error
    if spec is None or not spec.has_location or not str(spec.origin).endswith(".py"):
        raise ConfigError(
            f"{key} is {name}, and there is no module {module} in {os.getcwd()} or on PYTHONPATH; correct the name, or "
            "give the path of its file as path/file.py:Class"
        )
    return spec


def _execute(key: str, name: str, spec: ModuleSpec, file: Path, source: bytes) -> ModuleType:
    """Run exactly the bytes whose digest is recorded; Python's own cache of compiled files may be a second behind."""
    if spec.name in sys.modules and not spec.name.startswith("rlpt_extension_"):
        return sys.modules[spec.name]
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        exec(compile(source, str(file), "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        del sys.modules[spec.name]
        if not isinstance(error, Exception):
            raise
        missing = (isinstance(error, ImportError) and error.name) or ""
        advice = f"; import {missing} inside of the methods that need it" if missing in ("torch", "numpy") else ""
        raise ConfigError(f"{key} is {name}, which cannot be imported ({describe_error(error)}){advice}") from error
    return module
