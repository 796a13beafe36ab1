"""Which feature codes a split holds, and what a reader must know before comparing the scores of splits."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from datasets.scene import check_choice
from errors import UserError

SPLITS = ("train", "val", "test")
SPLIT_MODES = ("independent", "f_disjoint_hash", "f_ranked_three_way")


def split_name(split: str) -> str:
    """The split in lower case without surrounding space."""
    name = str(split).strip().lower()
    check_choice("split", name, SPLITS)
    return name


def bit_strings(codes: np.ndarray) -> list[str]:
    """Feature codes [M, n] as strings of 0 and 1, first group first."""
    return [row.tobytes().decode() for row in np.asarray(codes, np.uint8) + np.uint8(ord("0"))]


def digest(salt: str, bits: str) -> str:
    """Lower-case hexadecimal SHA-1 of "salt|bits": the published key of a feature code."""
    return hashlib.sha1(f"{salt}|{bits}".encode()).hexdigest()


def parse_buckets(buckets: int | str | Sequence[int] | None, option: str) -> list[int]:
    """Hash buckets from a list or a comma-separated string, sorted and each once."""
    parts = buckets.split(",") if isinstance(buckets, str) else [buckets] if isinstance(buckets, int) else buckets or []
    try:
        return sorted({int(part) for part in parts if str(part).strip()})
    except (TypeError, ValueError):
        raise UserError(f"dataset.{option}: got {buckets!r}, expected whole numbers such as [0,1] or '0,1'") from None


def split_codes(
    candidates: np.ndarray,
    split: str,
    *,
    mode: str = "independent",
    salt: str = "",
    exclude_all_ones: bool = False,
    hash_mod: int = 10,
    test_buckets: int | str | Sequence[int] = (0,),
    val_buckets: int | str | Sequence[int] | None = None,
    train_count: int | None = None,
    val_count: int | None = None,
    test_count: int | None = None,
) -> np.ndarray:
    """The feature codes of one split, byte for byte by the published rules: [n, F] to [m, F] uint8.

    independent: all of them. f_disjoint_hash: by int(SHA-1, 16) mod `hash_mod`; without `val_buckets` validation has
    the codes of training. f_ranked_three_way: in the order of (SHA-1, bits), the first `train_count`, the next
    `val_count`, the rest; a missing val or test count is a sixth of all, a missing train count what remains. Order of
    the result: as ranked, otherwise as given.

    Raises:
        UserError: unknown mode; buckets out of range, empty or shared by test and val (published code lets these
            overlap, so that test codes are validated on); counts that are negative or do not sum to the total.
    """
    split = split_name(split)
    check_choice("split_mode", mode, SPLIT_MODES)
    candidates = np.asarray(candidates, np.uint8)
    if exclude_all_ones:
        candidates = candidates[~candidates.all(1)]
    if mode == "f_disjoint_hash":
        test, val = _check_buckets(hash_mod, test_buckets, val_buckets)
        return candidates[_in_split_by_hash(bit_strings(candidates), split, salt, int(hash_mod), test, val)]
    if mode == "f_ranked_three_way":
        start, stop = _range_of_split(len(candidates), split, train_count, val_count, test_count)
        return candidates[_rank(bit_strings(candidates), salt)[start:stop]]
    return candidates


def _check_buckets(hash_mod: int, test_buckets: Any, val_buckets: Any) -> tuple[list[int], list[int]]:
    """Test and validation buckets as lists."""
    test = parse_buckets(test_buckets, "f_split_test_buckets")
    val = parse_buckets(val_buckets, "f_split_val_buckets")
    if int(hash_mod) < 2:
        raise UserError(f"dataset.f_split_hash_mod: got {hash_mod}, expected at least 2")
    if not test:
        raise UserError("dataset.f_split_test_buckets: got none, expected at least one bucket")
    for bucket in (*test, *val):
        if not 0 <= bucket < hash_mod:
            raise UserError(f"dataset.f_split_*_buckets: got bucket {bucket}, expected 0 to {hash_mod - 1}")
    if shared := sorted(set(test) & set(val)):
        raise UserError(
            f"dataset.f_split_val_buckets: {shared} are also in f_split_test_buckets, give each bucket to one split"
        )
    return test, val


def _in_split_by_hash(
    keys: Sequence[str], split: str, salt: str, hash_mod: int, test: Sequence[int], val: Sequence[int]
) -> np.ndarray:
    """Whether each feature code belongs to the split, [n] bool."""
    bucket = np.array([int(digest(salt, key), 16) % hash_mod for key in keys])
    if split == "test":
        return np.isin(bucket, test)
    if split == "val" and val:
        return np.isin(bucket, val)
    return ~np.isin(bucket, [*test, *val])


def _rank(keys: Sequence[str], salt: str) -> list[int]:
    """Positions of the feature codes in the order of (SHA-1, bits)."""
    return sorted(range(len(keys)), key=lambda i: (digest(salt, keys[i]), keys[i]))


def _range_of_split(total: int, split: str, train: int | None, val: int | None, test: int | None) -> tuple[int, int]:
    """First and last place (exclusive) of a split among the ranked feature codes."""
    val = total // 6 if val is None else int(val)
    test = total // 6 if test is None else int(test)
    train = total - val - test if train is None else int(train)
    if min(train, val, test) < 0 or train + val + test != total:
        raise UserError(
            f"dataset.f_split_train_count, f_split_val_count, f_split_test_count: got {train} + {val} + {test} = "
            f"{train + val + test}, expected counts of at least 0 that sum to the {total} feature codes"
        )
    bounds = {"train": (0, train), "val": (train, train + val), "test": (train + val, total)}
    return bounds[split]


def pack(codes: np.ndarray) -> np.ndarray:
    """Rows of 0 and 1 as one comparable value each, [M, n] to [M] (bytes)."""
    packed = np.ascontiguousarray(np.packbits(np.asarray(codes, np.uint8), axis=1))
    return packed.view(np.dtype((np.void, packed.shape[1]))).reshape(-1)


def split_report(splits: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a reader must know before comparing the scores of splits.

    splits: per split the labels of its samples: "object_code" [M, K], "feature_code" [M, n], "H_Y_given_F" [M] or
    [M, 1] in bits. Returns, JSON-able: "splits" with n, distinct_F, distinct_Y, largest_F_mass (share of the samples
    with the most frequent feature code), E_H_Y_given_F and the plug-in H_F (at most log2 n, so low where codes are
    rare) in bits; "overlap" per pair of splits with the share of the second split's samples whose F, and whose Y, occur
    in the first; "warnings", a list of sentences.
    """
    facts, packed = {}, {}
    for name, labels in splits.items():
        codes = {key: pack(np.asarray(labels[key])) for key in ("object_code", "feature_code")}
        packed[name] = codes
        n = len(codes["feature_code"])
        if not n:
            raise UserError(f"split {name}: no samples, expected at least one")
        _, times = np.unique(codes["feature_code"], return_counts=True)
        share = times / n
        facts[name] = {
            "n": n,
            "distinct_F": len(times),
            "distinct_Y": len(np.unique(codes["object_code"])),
            "largest_F_mass": float(share.max()),
            "E_H_Y_given_F": float(np.asarray(labels["H_Y_given_F"], np.float64).mean()),
            "H_F": float(-(share * np.log2(share)).sum() + 0.0),
        }
    overlap = {
        f"{second} in {first}": {
            "F": float(np.isin(packed[second]["feature_code"], packed[first]["feature_code"]).mean()),
            "Y": float(np.isin(packed[second]["object_code"], packed[first]["object_code"]).mean()),
        }
        for first, second in itertools.combinations(facts, 2)
    }
    return {"splits": facts, "overlap": overlap, "warnings": _comparability(facts, overlap)}


def _comparability(facts: Mapping[str, Mapping], overlap: Mapping[str, Mapping]) -> list[str]:
    """Sentences on what makes splits incomparable; thresholds are our choice: 2 % of H, half of the mass."""
    warnings = []
    for first, second in itertools.combinations(facts, 2):
        one, two = facts[first]["E_H_Y_given_F"], facts[second]["E_H_Y_given_F"]
        if abs(one - two) > 0.02 * max(one, two):
            warnings.append(
                f"{first} and {second}: mean H(Y|F) differs ({one:.2f} and {two:.2f} bits), "
                "their binding ratios are not comparable"
            )
    for name, fact in facts.items():
        if fact["largest_F_mass"] > 0.5 and fact["distinct_F"] > 1:
            warnings.append(f"{name}: one feature code holds {fact['largest_F_mass']:.0%} of the samples")
    shares = {pair: values["F"] for pair, values in overlap.items() if pair.endswith(" in train")}
    if len(shares) > 1 and max(shares.values()) - min(shares.values()) > 0.5:
        text = ", ".join(f"{pair} {share:.0%}" for pair, share in shares.items())
        warnings.append(f"feature codes seen in training: {text}; the one tests recall, the other generalisation")
    return warnings
