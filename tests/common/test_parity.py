"""Parity cases of the shared losses (goldens/common), in the type that a user trains in; tests/kernels runs them on the other paths."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from common import contrastive as c
from common.kernels.pair_lse import Path, pair_lse
from common.kernels.patch_loss import patch_loss
from tests.parity import Case, Runner, cases, check

Outputs = dict[str, Tensor]


def runners(dtype: torch.dtype = torch.float32, path: Path = "auto") -> Mapping[str, Runner]:
    """One runner a kind, computing in `dtype` on one path of the kernels."""

    def leaf(value: Tensor) -> Tensor:
        return value.detach().to(dtype, copy=True).requires_grad_()

    def index(count: int, start: int = 0) -> Tensor:
        return torch.arange(start, start + count)

    def scale_of(case: Case) -> tuple[Tensor, Tensor]:
        log_scale = torch.tensor(case.config["log_scale"], dtype=dtype, requires_grad=True)
        return log_scale, log_scale.exp()

    def one_way(case: Case) -> Outputs:
        query, key, offset = leaf(case.inputs["query"]), leaf(case.inputs["key"]), case.config["offset"]
        log_scale, scale = scale_of(case)
        unit_query, unit_key = c.unit(query), c.unit(key)
        unit_query.retain_grad(), unit_key.retain_grad()
        per_row = c.info_nce(unit_query, unit_key, scale, offset=offset, reduction="none", path=path)
        loss = c.info_nce(unit_query, unit_key, scale, offset=offset, path=path)
        loss.backward()
        out = {"loss": loss, "loss_per_row": per_row, "lse_per_row": pair_lse(unit_query, unit_key, scale, path=path)[0]}
        out |= {"grad_query": query.grad, "grad_key": key.grad, "grad_log_scale": log_scale.grad}
        return out | {"unit_grad_query": unit_query.grad, "unit_grad_key": unit_key.grad}

    def symmetric(case: Case) -> Outputs:
        a, b = leaf(case.inputs["a"]), leaf(case.inputs["b"])
        log_scale, scale = scale_of(case)
        loss = c.symmetric_info_nce(c.unit(a), c.unit(b), scale, path=path)
        loss.backward()
        row, column = pair_lse(c.unit(a), c.unit(b), scale, both=True, path=path)
        one, other = (c.info_nce(c.unit(q), c.unit(k), scale, path=path) for q, k in ((a, b), (b, a)))
        out = {"loss": loss, "loss_a": one, "loss_b": other, "lse_a": row, "lse_b": column}
        return out | {"grad_a": a.grad, "grad_b": b.grad, "grad_log_scale": log_scale.grad}

    def ranks(case: Case) -> Outputs:
        """What each rank computes, in one process: the real gather is held against this rule in tests/distributed."""
        world, batch = case.config["world_size"], case.config["batch_per_rank"]
        out: Outputs = {}
        for policy in ("none", "local", "full"):
            a, b = leaf(case.inputs["a"]), leaf(case.inputs["b"])
            for rank in range(world):
                own = slice(rank * batch, (rank + 1) * batch)
                log_scale, scale = scale_of(case)
                every = torch.zeros(world * batch, 1, dtype=torch.bool)
                every[own] = policy == "local"
                keys = [rows if policy == "full" else torch.where(every, rows, rows.detach()) for rows in (c.unit(a), c.unit(b))]
                one = c.info_nce(c.unit(a)[own], keys[1], scale, offset=rank * batch, path=path)
                other = c.info_nce(c.unit(b)[own], keys[0], scale, offset=rank * batch, path=path)
                loss = (one + other) / 2
                loss.backward()
                out |= {f"loss.rank{rank}": loss, f"grad_log_scale.rank{rank}": log_scale.grad}
            for rank in range(world):
                own = slice(rank * batch, (rank + 1) * batch)
                out |= {f"grad_a.{policy}.rank{rank}": a.grad[own], f"grad_b.{policy}.rank{rank}": b.grad[own]}
        return out

    def nt_xent(case: Case) -> Outputs:
        out: Outputs = {}
        for temperature in case.config["temperatures"]:
            a, b = leaf(case.inputs["a"]), leaf(case.inputs["b"])
            per_row = c.nt_xent(c.unit(a), c.unit(b), 1 / temperature, reduction="none", path=path)
            loss = c.nt_xent(c.unit(a), c.unit(b), 1 / temperature, path=path)
            loss.backward()
            found = {"loss": loss, "loss_per_row": per_row, "grad_a": a.grad, "grad_b": b.grad}
            out |= {f"{name}.tau{temperature:g}": value for name, value in found.items()}
        return out

    def supcon(case: Case) -> Outputs:
        out: Outputs = {}
        for alone in ("drop", "zero"):
            features = leaf(case.inputs["features"])
            got = c.supcon(c.unit(features), case.inputs["labels"], 1 / case.config["temperature"], alone=alone, path=path)
            got.loss.backward()
            out |= {f"loss.{alone}": got.loss, f"grad.{alone}": features.grad}
        return out | {"loss_per_row": got.per_row, "has_positive": got.has_positive}

    def supcon_rank(case: Case) -> Outputs:
        query, key, inputs = leaf(case.inputs["query"]), leaf(case.inputs["key"]), case.inputs
        got = c.supcon(
            c.unit(query),
            inputs["query_labels"],
            1 / case.config["temperature"],
            key=c.unit(key),
            key_labels=inputs["key_labels"],
            offset=case.config["offset"],
            path=path,
        )
        got.loss.backward()
        return {"loss": got.loss, "loss_per_row": got.per_row, "grad_query": query.grad, "grad_key": key.grad}

    def multi_view(case: Case) -> Outputs:
        out: Outputs = {}
        for name, labels, anchors in (
            ("supervised", case.inputs["labels"], "all"),
            ("unsupervised", None, "all"),
            ("first_view", case.inputs["labels"], "first"),
            ("sub_anchors", case.inputs["labels"], "all_but_last"),
        ):
            features = leaf(case.inputs["features"])
            loss = c.multi_view_supcon(c.unit(features), labels, 1 / case.config["temperature"], anchors=anchors, path=path).loss
            loss.backward()
            out |= {f"loss.{name}": loss, f"grad.{name}": features.grad}
        return out

    def moco(case: Case) -> Outputs:
        query, key, scale = leaf(case.inputs["query"]), leaf(case.inputs["key"]), 1 / case.config["temperature"]
        queue = c.Queue(case.config["queue"], case.config["dim"]).to(dtype)
        queue.rows.copy_(c.unit(case.inputs["queue"].to(dtype)))
        queue.pointer.fill_(case.config["pointer"])
        keys = queue.keys()
        per_row = c.queue_info_nce(c.unit(query), c.unit(key), keys, scale, reduction="none", path=path)
        loss = c.queue_info_nce(c.unit(query), c.unit(key), keys, scale, path=path)
        queue.push(c.unit(key))
        loss.backward()
        assert key.grad is None
        return {"loss": loss, "loss_per_row": per_row, "grad_query": query.grad, "next_queue": queue.rows, "next_pointer": queue.pointer}

    def soft_targets(case: Case) -> Outputs:
        out: Outputs = {}
        for temperature in case.config["temperatures"]:
            preds, targets = leaf(case.inputs["preds"]), leaf(case.inputs["targets"])
            loss = c.soft_targets(c.unit(preds), c.unit(targets), 1 / temperature)
            loss.backward()
            assert targets.grad is None
            out |= {f"loss.tau{temperature:g}": loss, f"grad_preds.tau{temperature:g}": preds.grad}
        return out

    def weighted(case: Case) -> Outputs:
        out: Outputs = {}
        for form in ("power", "sum"):
            z = leaf(case.inputs["z"])
            entries = case.inputs[f"{form}.index"], case.inputs[f"{form}.value"].to(dtype)
            got = c.weighted_positives(c.unit(z), *entries, case.config["temperature"], path=path)
            got.loss.backward()
            found = {
                "loss": got.loss,
                "loss_per_row": got.per_row,
                "denominator": got.denominator,
                "positives": got.positives,
                "grad": z.grad,
            }
            out |= {f"{name}.{form}": value for name, value in found.items()}
        return out

    def edges(case: Case) -> Outputs:
        a, b, pairs, scale = leaf(case.inputs["a"]), leaf(case.inputs["b"]), case.config["pairs"], 1 / 0.1
        equal = c.unit(a).expand(pairs, -1)
        alone = torch.cat([c.unit(a), c.unit(b)])
        no_positive = c.supcon(alone, index(2), scale, path=path)
        one_pair = c.nt_xent(c.unit(a), c.unit(b), scale, path=path)
        excluded = c.info_nce(c.unit(a), c.unit(b), scale, query_group=index(1), key_group=index(1), path=path)
        one_key = c.info_nce(c.unit(a), c.unit(b), scale, path=path)
        (no_positive.loss + one_pair + excluded + one_key).backward()
        assert a.grad.abs().max() == 0
        assert b.grad.abs().max() == 0
        return {
            "nt_xent.one_pair": one_pair,
            "one_way.one_key": one_key,
            "supcon.no_positive": no_positive.loss,
            "nt_xent.all_equal": c.nt_xent(equal, equal, scale, path=path),
            "one_way.all_equal": c.info_nce(equal, equal, scale, path=path),
            "supcon.all_equal": c.supcon(equal, torch.zeros(pairs, dtype=torch.long), scale, path=path).loss,
            "one_way.excluded_alone": excluded,
        }

    def masked_patch_loss(case: Case) -> Outputs:
        images, patch, eps = case.inputs["images"].to(dtype), case.config["patch"], case.config["eps"]
        hidden, out = case.inputs["hidden"], {}
        every = index(hidden.shape[1]).expand(hidden.shape[0], -1)
        for name, options in (
            ("inside", {"normalise": "patch", "eps_inside": True}),
            ("per_channel", {"normalise": "channel", "eps_inside": False}),
            ("none", {"normalise": "none"}),
        ):
            pred = leaf(case.inputs["pred"])
            per_patch = patch_loss(pred, images, every, patch, eps=eps, path=path, **options)[..., 0]
            loss = (per_patch * hidden).sum() / hidden.sum()
            loss.backward()
            out |= {f"loss.{name}": loss, f"loss_per_patch.{name}": per_patch, f"grad_pred.{name}": pred.grad}
        pred = leaf(case.inputs["sensor_pred"])
        first_entries = case.config["channels"] * patch**2
        sensors = case.inputs["sensors"].to(dtype)
        both = patch_loss(pred, sensors, every, patch, order="c p q", normalise="patch", eps=eps, split=first_entries, path=path)
        second = case.inputs["hidden_second"]
        losses = (both[..., 0] * hidden).sum() / hidden.sum(), (both[..., 1] * second).sum() / second.sum()
        (losses[0] + losses[1]).backward()
        return out | {"loss.split_first": losses[0], "loss.split_second": losses[1], "grad_pred.split": pred.grad}

    kinds: dict[str, Callable[[Case], Outputs]] = {
        "info_nce_one_way": one_way,
        "info_nce_symmetric": symmetric,
        "info_nce_sharp": symmetric,
        "info_nce_ranks": ranks,
        "nt_xent": nt_xent,
        "supcon": supcon,
        "supcon_rank": supcon_rank,
        "selfcon_multi_view": multi_view,
        "moco_queue": moco,
        "soft_targets": soft_targets,
        "weighted_positives": weighted,
        "contrastive_edges": edges,
        "masked_patch_loss": masked_patch_loss,
    }
    return kinds


RUNNERS = runners()


@pytest.mark.parametrize("case", cases("common"), ids=str)
def test_case(case: Case) -> None:
    check(case, RUNNERS)
