"""Running a context's block in its rewritten form, in the place of the one that Python would run.

When a context is entered, the source of its block is looked up by the instruction that the caller is at. Where something in
it may hang on a value (`block_rewrite`), a trace function is set on the caller's frame for the few instructions until the
block begins. There it raises `Skipped`, so that Python goes to the context's ``__exit__`` at once; that runs the rewritten
code, which has the file, the lines and the names of the original.

Where Python calls no trace functions (inside a debugger's own callback) the block runs as it is written, and a value that is
asked for its truth says so.
"""

from __future__ import annotations
import __future__

import ast
import sys
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

from nnsight_hpc.tracing import block_names as names
from nnsight_hpc.tracing.block_rewrite import rewritten
from nnsight_hpc.tracing.block_source import find, inner_codes, stores
from nnsight_hpc.tracing.block_templates import RUNTIME, is_ours, statements
from nnsight_hpc.tracing.frames import outer_of_wrapper

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from nnsight_hpc.tracing.block_source import Block

_MOST = 1024
_FUNCTION = "__block__"
_FUTURE = __future__.annotations.compiler_flag
_UNMANAGED = frozenset({"locals", "vars", "eval", "exec", "dir", "super", "__class__"})


_IN_FUNCTION = "put it in a function"


class Skipped(BaseException):
    """Raised where a block begins that has been, or is to be, run in its rewritten form."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to do at one ``with`` statement.

    Attributes
    ----------
    code
        The rewritten block as a function of the runtime and of `parameters`.
    parameters
        The names of the function that the block uses.
    written
        Those that it binds.
    bound
        All names that it binds other than as targets of loops.
    lent
        Global names that only the rewritten code binds (to lists of the worker): they are given back.
    start
        The offset of the original block's first instruction.
    """

    code: CodeType
    parameters: tuple[str, ...]
    written: tuple[str, ...]
    bound: tuple[str, ...]
    lent: tuple[str, ...]
    start: int


@dataclass(frozen=True, slots=True)
class AsWritten:
    """A block that is run as it is written, and why if something in it may hang on a value; with what to do about that."""

    why: str = ""
    instead: str = ""


_plans: dict[tuple[int, int], tuple[CodeType, _Plan | Literal["outer"] | AsWritten]] = {}
"""By code object and instruction; the code is held so that its id stays its own."""
_ours: WeakValueDictionary[int, CodeType] = WeakValueDictionary()
"""Rewritten code by its id: contexts in it have been rewritten with it."""


_NO_SOURCE = AsWritten(
    "its source cannot be read: it was typed at a prompt, run by exec or changed since, or its cell begins with %%time",
    "put it in a cell without such a line, or in a file",
)


def enter(frame: FrameType) -> BlockRun | None:
    """Arrange that the block of the context whose ``__enter__`` `frame` calls is run in its rewritten form, if it has one.

    The context's ``__exit__`` then gets `Skipped` and calls `BlockRun.finish`.
    """
    key = id(frame.f_code), frame.f_lasti
    known = _plans.get(key)
    if known is None:
        if len(_plans) >= _MOST:
            _plans.clear()
        known = _plans[key] = frame.f_code, AsWritten() if id(frame.f_code) in _ours else _plan(frame)
    plan = known[1]
    if isinstance(plan, AsWritten):
        return None
    if plan == "outer":
        outer = outer_of_wrapper(frame)
        return None if outer is None else enter(outer)
    run = BlockRun(frame, plan)
    return run if run.arm() else None


def why_unrecorded(frame: FrameType) -> AsWritten:
    """Why what `frame` does with a value (asks for its truth, goes through it) is not recorded."""
    outer: FrameType | None = frame
    while outer is not None:
        entered = [at for code, at in _plans if code == id(outer.f_code) and at < outer.f_lasti]
        plan = _plans[id(outer.f_code), max(entered)][1] if entered else None
        if outer is not frame and (plan is not None or id(outer.f_code) in _ours):
            name = frame.f_code.co_name
            return AsWritten(
                f"the block is recorded, and {name!r}, which it calls, only run", "write it in the block itself"
            )
        if isinstance(plan, AsWritten) and plan.why:
            return plan
        outer = outer.f_back
    return AsWritten()


class BlockRun:
    """One block that is to be skipped and run in its rewritten form."""

    def __init__(self, frame: FrameType, plan: _Plan) -> None:
        self._frame, self._plan = frame, plan
        self._heard = False
        self._before: tuple[Any, Any, bool] | None = None

    def arm(self) -> bool:
        """Have the block skipped; whatever trace function is active (debugger, coverage) is back when it runs.

        Returns False where Python calls no trace functions, as within one.
        """
        frame = self._frame
        self._before = sys.gettrace(), frame.f_trace, frame.f_trace_opcodes
        frame.f_trace_opcodes = True
        frame.f_trace = self._step
        sys.settrace(self._hear)
        _nothing()
        if not self._heard:
            self._disarm()
        return self._heard

    def finish(self, end: Callable[[BaseException | None], None]) -> bool:
        """Run the rewritten block, then `end` with the exception that left it; returns True, or raises that exception."""
        self._disarm()
        try:
            self._run()
        except BaseException as error:
            _forget_skipped(error)
            end(error)
            raise
        end(None)
        return True

    def _run(self) -> None:
        from nnsight_hpc.tracing.block_runtime import Runtime  # noqa: PLC0415 - loads torch, by way of values

        frame, plan = self._frame, self._plan
        runtime = Runtime(frame, plan.written, plan.bound)
        own = frame.f_locals
        arguments = [own.get(name, runtime.unbound) for name in plan.parameters]
        held = {name: frame.f_globals[name] for name in plan.lent if name in frame.f_globals}
        try:
            FunctionType(plan.code, frame.f_globals)(runtime, *arguments)
        finally:
            frame.f_globals.update(held)
        runtime.finish()

    def _step(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if event in ("exception", "return"):
            self._disarm()
        elif frame.f_lasti >= self._plan.start:
            raise Skipped  # Python switches tracing off now; `finish` brings back what was there before
        return self._step

    def _hear(self, _frame: FrameType, _event: str, _argument: Any) -> None:
        self._heard = True

    def _disarm(self) -> None:
        if self._before is None:
            return
        (active, local, opcodes), self._before = self._before, None
        frame = self._frame
        frame.f_trace, frame.f_trace_opcodes = local, opcodes
        sys.settrace(active)
        if active is not None and not isinstance(active, FunctionType | MethodType):
            _catch_up(active, frame)


def _nothing() -> None:
    """Called to learn whether trace functions are."""


def _catch_up(tracer: Callable[[FrameType, str, None], object], outer: FrameType) -> None:
    """Tell a tracer that keeps count of calls (coverage's in C, which sees every return) of those it has missed."""
    missed = []
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the call of this function was seen
    while frame is not None and frame is not outer:
        missed.append(frame)
        frame = frame.f_back
    for frame in reversed(missed):
        tracer(frame, "call", None)


def _forget_skipped(error: BaseException) -> None:
    """`Skipped` was being handled when the error was raised; it is no part of the researcher's story."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current.__context__, Skipped):
            current.__context__ = current.__context__.__context__
        current = current.__context__


def _plan(frame: FrameType) -> _Plan | Literal["outer"] | AsWritten:
    """How to run the block."""
    block = find(frame)
    if block is None:
        return _NO_SOURCE
    if outer_of_wrapper(frame) is not None and _hands_over(block):
        return "outer"
    code = frame.f_code
    in_function = bool(code.co_flags & 0x1)  # CO_OPTIMIZED: a function's names are fast locals
    if not in_function and frame.f_locals is not frame.f_globals:
        return AsWritten("it stands in the body of a class", _IN_FUNCTION)
    if what := names.leaves(block.body) or next(iter(_UNMANAGED & names.read(block.body)), ""):
        return AsWritten(f"it holds `{what}`", f"take `{what}` out of the block")
    if isinstance(block.body[0], ast.Try | ast.TryStar):  # no instruction before its own handlers is in the context's
        return AsWritten("it begins with `try:`", "write a line of the block before that")
    local = {*code.co_varnames, *code.co_cellvars, *code.co_freevars} if in_function else set()
    bound = names.assigned(block.body)
    shared: set[str] = set()
    if in_function:
        if _seen_by_others(block, code):
            return AsWritten(
                "a function shares a variable with it, and one of them changes it", "give the variable two names"
            )
        outside = [c for c in inner_codes(code) if c.co_firstlineno not in block.lines and not _is_comprehension(c)]
        shared = {name for c in outside for name in c.co_freevars if name in bound} | {*code.co_freevars}.intersection(
            bound
        )
    body = rewritten(block.body, shared)
    if body is None:
        return AsWritten()
    used = names.read(block.body) | set(bound)
    parameters = tuple(sorted(local & used))
    new = {name for name in names.assigned(body) if name not in local and name not in bound and not is_ours(name)}
    globals_ = sorted({name for name in bound if name not in local} | new)
    made = _compiled(body, block, frame, parameters, globals_)
    if made is None:
        return AsWritten("its names cannot be told", _IN_FUNCTION)
    written, targets = tuple(name for name in bound if name in local), names.targets(block.body)
    others = tuple(name for name in bound if name not in targets)
    return _Plan(made, parameters, written, others, tuple(sorted(new)), block.start)


def _hands_over(block: Block) -> bool:
    """Whether a ``@contextmanager`` function does nothing in the context but run its user's block, at the end."""
    last = block.body[-1]
    return isinstance(last, ast.Expr) and isinstance(last.value, ast.Yield) and not names.leaves(block.body[:-1])


def _seen_by_others(block: Block, code: CodeType) -> bool:
    """Whether a variable is shared with a function in a way that a copy of the block cannot keep up.

    A function from outside changes what the block reads; a function of the block reads what is changed afterwards.
    """
    used = names.read(block.body)
    inside = [c for c in inner_codes(code) if c.co_firstlineno in block.lines and not _is_comprehension(c)]
    outside = [c for c in inner_codes(code) if c.co_firstlineno not in block.lines]
    changed = {name for c in outside for name in _changed_by(c) if name in c.co_freevars}
    if changed & used:
        return True
    repeated = any(isinstance(node, ast.For | ast.While) for node in block.around)
    later = {name for name, line in stores(code) if line not in block.lines and (repeated or line >= block.lines.stop)}
    return any(later.intersection(c.co_freevars) for c in inside)


def _changed_by(code: CodeType) -> set[str]:
    return {name for name, _ in stores(code)}.union(*(_changed_by(c) for c in inner_codes(code)))


def _is_comprehension(code: CodeType) -> bool:
    return code.co_name in ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")


def _compiled(
    body: list[ast.stmt], block: Block, frame: FrameType, parameters: tuple[str, ...], globals_: list[str]
) -> CodeType | None:
    """The body as the code of a function, under the name, the file and the lines of the original."""
    code, at = frame.f_code, block.body[0]
    head = "".join(f"if {name} is {RUNTIME}.unbound: del {name}\n" for name in parameters)
    head += f"global {', '.join(globals_)}\n" if globals_ else ""
    text = f"def {_FUNCTION}({', '.join((RUNTIME, *parameters))}):\n BODY"
    place = ast.copy_location(ast.Constant(None), at)
    place.end_lineno, place.end_col_offset = place.lineno, place.col_offset
    around = statements(f"try: BODY\nfinally: {RUNTIME}.leave()", place, BODY=body)
    tree: list[ast.stmt] = statements(text, place, BODY=[*statements(head, place), *around])
    for outer in reversed(block.around):
        if isinstance(outer, ast.ClassDef):  # for names like `self.__x`
            tree = statements(f"class {outer.name}: BODY", place, BODY=tree)
    try:
        found: CodeType = compile(
            ast.Module(tree, []), code.co_filename, "exec", flags=code.co_flags & _FUTURE, dont_inherit=True
        )
    except SyntaxError:  # `import *`, an annotated global
        return None
    while found.co_name != _FUNCTION:
        found = next(inner_codes(found))
    result = found.replace(co_name=code.co_name, co_qualname=code.co_qualname)
    if result.co_freevars:
        return None
    _ours[id(result)] = result
    return result
