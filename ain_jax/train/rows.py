"""The rows of new pieces as a tree of their own: taken out of the parameters, trained, put back.

    rows = take(params, first=6, count=2)      {"model": {"embed_tokens": {"weight": rows_ND}}, "lm_head": ...}
    params = put(params, rows, first=6)        rows 6 and 7 of each table; every other number stays as it was

An optimiser made for `rows` keeps state for them alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ain_jax.train.optimizer import path_name

TABLES = (("model", "embed_tokens", "weight"), ("lm_head", "weight"))  # the second where the head is not tied


def take(params: Mapping[str, Any], first: int, count: int) -> dict[str, Any]:
    """Rows `first` to `first + count - 1` of the embedding and, where it is not tied, of the head, under their paths.

    Raises ValueError where a table has no such rows.
    """
    flat: dict[Any, Any] = dict(flatten_dict(dict(params)))
    tables = {path: flat[path] for path in TABLES if path in flat}
    if not tables:
        raise ValueError(f"no table of rows among {', '.join(sorted(params))}; expected model/embed_tokens/weight")
    for path, table_VD in tables.items():
        if first < 0 or count < 1 or first + count > table_VD.shape[0]:
            raise ValueError(
                f"rows {first} to {first + count - 1} of {'/'.join(path)}, which has {table_VD.shape[0]}: "
                "make the table longer first (`weights.embeddings.extend_params`)"
            )
    return unflatten_dict({path: table_VD[first : first + count] for path, table_VD in tables.items()})


def put(params: Mapping[str, Any], rows: Mapping[str, Any], first: int) -> dict[str, Any]:
    """`params` with these rows at `first`; a new tree, the old one stays. A gradient flows to both."""
    flat: dict[Any, Any] = dict(flatten_dict(dict(params)))
    for path, rows_ND in dict[Any, Any](flatten_dict(dict(rows))).items():
        if path not in flat or flat[path].shape[1:] != rows_ND.shape[1:]:
            found = flat[path].shape if path in flat else "no such table"
            raise ValueError(f"{'/'.join(path)}: rows of shape {rows_ND.shape}, but the parameters have {found}")
        if first < 0 or first + rows_ND.shape[0] > flat[path].shape[0]:
            raise ValueError(
                f"{'/'.join(path)}: {rows_ND.shape[0]} rows at {first}, but the table ends at {flat[path].shape[0]}"
            )
        flat[path] = jax.lax.dynamic_update_slice_in_dim(flat[path], rows_ND.astype(flat[path].dtype), first, axis=0)
    return unflatten_dict(flat)


def means(params: Mapping[str, Any], spelt: Sequence[Sequence[int]]) -> dict[str, Any]:
    """For each list of ids the mean of their rows, of every table: a tree as `take` returns it.

    Raises ValueError where a list is empty.
    """
    empty = [number for number, ids in enumerate(spelt) if not ids]
    if empty:
        raise ValueError(f"piece {empty[0]} is spelt by no id; expected one or more")
    longest = max(map(len, spelt))
    ids_NM = jnp.asarray([[*ids, *[0] * (longest - len(ids))] for ids in spelt], jnp.int32)
    share_NM = jnp.asarray([[1 / len(ids)] * len(ids) + [0.0] * (longest - len(ids)) for ids in spelt], jnp.float32)
    flat: dict[Any, Any] = dict(flatten_dict(dict(params)))
    mean = lambda table_VD: jnp.einsum("NM,NMD->ND", share_NM, table_VD[ids_NM].astype(jnp.float32))
    return unflatten_dict({path: mean(flat[path]) for path in TABLES if path in flat})


def forget(opt_state: Any, first: int, count: int) -> Any:
    """The optimiser's state with `count` rows of every table from `first` on at zero, as at the first step."""
    names = tuple("/".join(path) for path in TABLES)

    def clear(path, leaf):
        of_table = jnp.ndim(leaf) == 2 and path_name(path).endswith(names)
        return leaf.at[first : first + count].set(0) if of_table else leaf

    return jax.tree_util.tree_map_with_path(clear, opt_state)
