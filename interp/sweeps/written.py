"""Digests of Python values by their contents, functions and objects with all that they hold and read included."""

import copyreg
import dis
import functools
import hashlib
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented))
# What interpreters make of a class, and what follows from the rest.
_DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType, types.WrapperDescriptorType)
# What a module of a library keeps under names with an underscore, beside its bookkeeping.
_NUMBERS = ("_parameters", "_buffers", "_modules")
# Wrappers that check types, and change nothing.
_CHECKERS = ("jaxtyping", "beartype")
_INSTALLED = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
_LIBRARIES = tuple(
    f"{path}{os.sep}" for path in [str(Path(__file__).parents[1]), sysconfig.get_path("stdlib"), *_INSTALLED]
)


class Unwritable(Exception):
    """A value that cannot be told apart from others of its kind."""


class Writer:
    """Digests values; equal contents have equal digests, in this process and in others.

    Functions count by their instructions and constants, and by the closures, defaults and globals that they use;
    objects by their class and state. Functions and classes of installed libraries count by their names.

    Args:
        tensor: the bytes that tell a tensor from others.
        known: names of objects, by their ``id``, that are not looked into.
    """

    def __init__(self, tensor: Callable[[Tensor], bytes], known: Mapping[int, str]) -> None:
        self._tensor = tensor
        self._known = dict(known)
        self._done: dict[int, tuple[Any, bytes]] = {}
        self._open: list[int] = []
        self._path: list[str] = []

    def digest(self, value: Any) -> bytes:
        """The digest of a value.

        Raises:
            Unwritable: it holds something that cannot be told apart from others of its kind.
        """
        if type(value) in _PLAIN:
            return _hashed(type(value).__name__, repr(value).encode())
        key = id(value)
        if key in self._known:
            return _hashed("known", self._known[key].encode())
        if key in self._done:
            return self._done[key][1]
        if key in self._open:
            return _hashed("cycle", str(len(self._open) - self._open.index(key)).encode())
        self._open.append(key)
        try:
            found = _hashed(*self._parts(value))
        finally:
            self._open.pop()
        # The value is kept, so that nothing else takes its id.
        self._done[key] = (value, found)
        return found

    def _named(self, name: str, value: Any) -> bytes:
        self._path.append(name)
        try:
            return _hashed(name, self.digest(value))
        finally:
            self._path.pop()

    def _each(self, values: Iterable[Any], name: str = "") -> Iterator[bytes]:
        for index, value in enumerate(values):
            yield self._named(f"{name}[{index}]", value)

    def _parts(self, value: Any) -> Iterable[Any]:
        """A kind, and the bytes that tell a value of it from others."""
        if isinstance(value, Tensor):
            return self._of_tensor(value)
        if type(value) in (list, tuple):
            return (type(value).__name__, *self._each(value))
        if type(value) in (set, frozenset):
            return (type(value).__name__, *sorted(self.digest(one) for one in value))
        if type(value) is dict:
            named = ((key, key if isinstance(key, str) else "[]", one) for key, one in value.items())
            pairs = (self.digest(key) + self._named(name, one) for key, name, one in named)
            return ("dict", *sorted(pairs))
        if isinstance(value, types.ModuleType):
            return ("module", value.__name__.encode())
        if isinstance(value, types.CodeType):
            return self._of_code(value)
        if isinstance(value, types.FunctionType):
            return self._of_function(value)
        if isinstance(value, types.MethodType):
            return ("method", self.digest(value.__func__), self._named("self", value.__self__))
        if isinstance(value, type):
            return self._of_class(value)
        if isinstance(value, staticmethod | classmethod):
            return (type(value).__name__, self.digest(value.__func__))
        if isinstance(value, property):
            return ("property", *self._each((value.fget, value.fset, value.fdel)))
        if isinstance(value, functools.cached_property):
            return ("property", self.digest(value.func))
        return self._of_object(value)

    def _of_tensor(self, value: Tensor) -> Iterable[Any]:
        try:
            return ("tensor", self._tensor(value))
        except Unwritable as error:
            raise Unwritable(f"{self._where()} is {error}, whose numbers cannot be read") from error

    def _of_code(self, code: types.CodeType) -> Iterable[Any]:
        numbers = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        exceptions = getattr(code, "co_exceptiontable", b"")
        names = (code.co_names, code.co_cellvars, code.co_freevars)
        return ("code", code.co_code, exceptions, *self._each((numbers, names)), *self._each(code.co_consts))

    def _of_function(self, function: types.FunctionType) -> Iterable[Any]:
        if _is_library_name(function):
            return ("library", f"{function.__module__}.{function.__qualname__}".encode())
        inner = _unchecked(function)
        if inner is not function:
            return ("checked", self.digest(inner))
        code = function.__code__
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        held = {f"closure {name!r}": cell.cell_contents for name, cell in cells if _filled(cell)}
        held |= {f"attribute {name!r}": value for name, value in vars(function).items()}
        held |= {"defaults": function.__defaults__, "keyword defaults": function.__kwdefaults__}
        if not code.co_filename.startswith(_LIBRARIES):
            held |= dict(_globals_of(function))
        return ("function", self.digest(code), *(self._named(name, value) for name, value in held.items()))

    def _of_class(self, kind: type) -> Iterable[Any]:
        name = f"{kind.__module__}.{kind.__qualname__}".encode()
        if _is_library(kind.__module__):
            return ("class", name)
        own = {
            attribute: value
            for attribute, value in vars(kind).items()
            if not isinstance(value, _DESCRIPTORS)
            and attribute != "_abc_impl"
            and (not attribute.startswith("__") or isinstance(value, types.FunctionType | staticmethod | classmethod))
        }
        return ("class", name, *self._each(kind.__bases__), *(self._named(key, own[key]) for key in sorted(own)))

    def _of_object(self, value: Any) -> Iterable[Any]:
        try:
            special = copyreg.dispatch_table.get(type(value))
            reduced = value.__reduce_ex__(4) if special is None else special(value)
        except Exception as error:
            # Whatever a class raises for what cannot be stored: mostly TypeError.
            raise Unwritable(
                f"{self._where()} is a {type(value).__module__}.{type(value).__qualname__}, whose contents cannot be "
                "compared"
            ) from error
        if isinstance(reduced, str):
            return ("global", f"{type(value).__module__}.{reduced}".encode())
        make, arguments, state, items, pairs = (*reduced[:5], None, None, None)[:5]
        if isinstance(state, dict):
            state = {name: one for name, one in state.items() if not _is_incidental(value, name)}
        listed, mapped = list(items or ()), dict(pairs or ())
        return ("object", *self._each((make, arguments)), self.digest(state), *self._each((listed, mapped)))

    def _where(self) -> str:
        return " of ".join(reversed([name for name in self._path if not name.startswith("[")])) or "this"


def _hashed(kind: str, *parts: bytes) -> bytes:
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        # With lengths, so that no two lists of parts read the same.
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def _is_library(module: str) -> bool:
    if module == "builtins":
        return True
    found = sys.modules.get(module)
    if found is None or module == "__main__":
        return False
    file = getattr(found, "__file__", None)
    return file is None or file.startswith(_LIBRARIES)


def _is_library_name(function: types.FunctionType) -> bool:
    """Whether a function is found by its name in an installed library."""
    if not function.__module__ or not _is_library(function.__module__):
        return False
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def _unchecked(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        module = str(getattr(function, "__globals__", {}).get("__name__", ""))
        if module.split(".")[0] not in _CHECKERS and not function.__code__.co_filename.startswith("<@beartype"):
            return function
        function = function.__wrapped__
    return function


def _filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _is_incidental(value: Any, name: Any) -> bool:
    """Whether an attribute follows from the others, or is a library's bookkeeping."""
    if isinstance(value, nn.Module) and _is_library(type(value).__module__):
        return name == "generation_config" or (name.startswith("_") and name not in _NUMBERS)
    return isinstance(name, str) and isinstance(getattr(type(value), name, None), functools.cached_property)


def _globals_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals that a function reads; of modules of one's own, the attributes that it may read."""
    read, attributes = set(), set()
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        read |= {str(one.argval) for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        attributes |= set(code.co_names)
        waiting += [one for one in code.co_consts if isinstance(one, types.CodeType)]
    for name in sorted(read & function.__globals__.keys()):
        value = function.__globals__[name]
        yield f"global {name!r}", value
        if isinstance(value, types.ModuleType) and not _is_library(value.__name__):
            for attribute in sorted(attributes & vars(value).keys()):
                yield f"{name}.{attribute}", vars(value)[attribute]
