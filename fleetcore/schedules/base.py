"""C2: the contract of a schedule: a collective algorithm as rows, made by a pure function.

A schedule is a function (rank, size, bounds, root=0) -> list of Row: what one rank does. Offsets count elements of the
whole array that the ranks work on together; segment r of it is [bounds[r], bounds[r + 1]), and bounds[size] is its
length. A bounds[0] above 0 leaves out what lies before it. (all_to_all alone has (rank, size, counts): its input and its output have offsets of their own.) It touches no
socket and no array, so that tests run every algorithm for every size in a simulator first.

A rank has an input and an output, which are the same memory for verbs that work in place. What lies there at the start
and what must lie there at the end is the verb's business (SCHEDULES says which verbs there are):

    all_reduce      input: the whole array           output: its reduction, in place
    broadcast       input: root's array              output: the same, on all
    reduce          input: the whole array           output: the reduction, on root; scratch elsewhere
    reduce_scatter  input: the whole array           output: the own segment's reduction; may be scratch around it
    all_gather      input: the own segment           output: all segments (the own one is put there by the caller)
    gather          input: the own segment           output: all segments, on root (likewise)
    scatter         input: all segments, on root     output: the own segment (likewise on root)
    all_to_all      input: a part for each rank      output: a part from each rank (the own one by the caller)

All but all_to_all may also be given the same memory as input and output. Alone, a rank has no rows: the caller copies.

Rules the executor relies on:
* a SEND reads the input if its `after` is -1, else the output; a COPY writes the output; a FOLD reduces what arrives
  with the input if its `after` is -1, else with the output, into the output;
* the k-th SEND to a peer meets the peer's k-th COPY or FOLD from this rank, with the same number of elements;
* a row may begin a chunk once row `after` has finished it; `after` is an earlier row whose range covers this one's;
* FOLD rows that share a `fold` number have the same range, the same `after` and different peers: they are reduced
  together with the rank's own data, all in rank order, once each peer's chunk is there;
* a COPY or FOLD may overwrite what a SEND reads only if one of the two surely comes first: by `after`, or because the
  bytes that arrive depend on the SEND having arrived;
* no receive waits for a SEND of its own rank to the same peer: links may hold less than a chunk, and both would wait.
"""
from typing import NamedTuple

SEND, COPY, FOLD = 0, 1, 2


class Row(NamedTuple):
    """One transfer of elements [start, stop) to or from a peer."""

    kind: int             # SEND, COPY (receive into place) or FOLD (receive, then reduce into place)
    peer: int
    start: int
    stop: int
    after: int = -1       # index of the row that must come first, chunk by chunk; -1: none
    fold: int = -1        # FOLD only: which rows are reduced together
    final: bool = False   # FOLD only: the result is complete (a mean is divided here)


def cut(count: int, size: int, shares=None) -> list[int]:
    """Bounds b[0..size] of the segments of `count` elements: segment r is [b[r], b[r + 1]).

    Args:    shares: relative sizes, one per rank; None for equal ones (they differ by at most one element).
    """
    if shares is None:
        return [count * r // size for r in range(size + 1)]
    total, bounds, seen = sum(shares), [0], 0
    for weight in shares:
        seen += weight
        bounds.append(round(count * seen / total))
    bounds[-1] = count
    return bounds
