"""Memory that is full, in whatever words a library says it."""

import errno

FULL = (
    "allocate memory",  # torch on a CPU, and the system: "cannot allocate memory"
    "not enough memory: you tried to allocate",
    "unable to allocate",
    "std::bad_alloc",
    "storage size calculation overflowed",
    "can't start new thread",
    "out of memory",
    "array is too big",
    "failed to map segment",  # a library that is loaded
    "cannot map zero-fill pages",
)
ADVICE = "lower --batch-size or choose a smaller --dtype"
TO_LOAD = "a library could not be loaded: raise the limit on memory (`ulimit -v`), or free some"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that the memory of a device or the main memory is full."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError | ValueError | OSError | ImportError) and any(
            words in str(error).lower() for words in FULL
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def memory_sentence(error: BaseException, advice: str = ADVICE) -> str:
    """What a user is told then, with the library's own words cut short."""
    advice = TO_LOAD if isinstance(error, ImportError) else advice
    words = " ".join(str(error).split())
    return f"out of memory ({words[:200] or type(error).__name__}); {advice}"
