"""One of the processes of `test_agreement.py`: rank, number of ranks, a folder for the group's store and the results.

Each scenario is run by all ranks; what it gives, or the error that it ends with, is written for each.
"""

import copy
import json
import logging
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from test_api import PROBLEM, inputs_of, layer_of, make_policy
from test_quarantine import CPU, ONE, Failing, put_all_but

from hybrid_moe import Candidate, DeviceKey, HybridMoE, RanksDifferError, backends, release_quarantine, save_policy
from hybrid_moe.measure.workloads import random_weights
from hybrid_moe.serving import agreement
from hybrid_moe.serving.quarantine import QUARANTINE
from hybrid_moe.version import __version__

RANK, RANKS, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
TOKENS = (1, 5, 50)  # `one`, `two` and the reference by `make_policy`
INPUTS = inputs_of(random_weights(PROBLEM, "cpu"), 7)


class Late(Failing):
    """Refuses only when it is prepared, if it is told to."""

    late = ()

    def prepare(self, problem, device, config):
        if self.late:
            raise backends.BackendUnsupportedError(Candidate(self.name), self.late)
        return super().prepare(problem, device, config)


def choices(layer):
    return [str(layer.choice(tokens)) for tokens in TOKENS]


def made(**options):
    options.setdefault("policy", make_policy())
    return layer_of(INPUTS, group=dist.group.WORLD, **options)


def alike(one, two):
    return choices(made())


def another_policy(one, two):
    path = FOLDER / f"policy{RANK}.json"
    regimes = make_policy().regimes
    save_policy(make_policy(regimes=regimes[:1]) if RANK == 2 else make_policy(), path)
    made(policy=path)


def another_backend(one, two):
    made(backend="one" if RANK == 1 else "two", policy=None)


def one_named_backend(one, two):
    return choices(made(backend="two", policy=None))


def a_package_that_one_rank_lacks(one, two):
    if RANK == 1:
        one.reasons = ["package flashing isn't installed"]
    layer = made()
    return [*choices(layer), *layer.explain(1).reasons]


def a_refusal_that_follows_from_another(one, two):
    # Nobody prepares `two` before rank 0's refusal of `one` is known.
    if RANK == 0:
        one.reasons = ["not here"]
    if RANK == 2:
        two.late = ["its library doesn't load"]
    layer = made(policy=make_policy(regimes=(), default=ONE))
    return [*choices(layer), *layer.explain(1).reasons]


def a_failure_to_prepare(one, two):
    if RANK == 2:
        one.at_prepare = OSError("no such symbol")
    layer = made()
    return [*choices(layer), *layer.explain(1).reasons]


def a_rank_that_raises(one, two):
    made(policy=FOLDER / "nowhere.json" if RANK == 1 else make_policy())


def nothing_that_all_can_run(one, two):
    put_all_but("one" if RANK else "two")
    made()


def quarantine_and_release(one, two):
    layer = made()
    if RANK == 1:
        QUARANTINE.put(CPU, PROBLEM, ONE, "shadow_check", "wrong")
    alone = choices(layer)
    layer.agree()
    together = choices(layer)
    release_quarantine()
    released = choices(layer)
    layer.agree()
    return [alone, together, released, choices(layer)]


def a_failure_to_warm_up(one, two):
    if RANK == 2:
        one.at_run = OSError("no kernel image")
    layer = made()
    warmed = layer.warm_up([1, 5])
    return [*[str(each.choice) for each in warmed], *choices(layer)]


def a_rank_that_cannot_warm_up(one, two):
    if RANK == 2:
        one.at_run = OSError("no kernel image")
    made(backend="one", policy=None).warm_up([1])


def another_policy_later(one, two):
    layer = made()
    try:
        layer.reload_policy(make_policy(regimes=()) if RANK == 0 else make_policy())
    except RanksDifferError as error:
        return [str(error), *choices(layer)]


def another_release(one, two):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("hybrid_moe").addHandler(handler)
    version = agreement.installed_version
    agreement.installed_version = lambda package: "9.9" if RANK == 2 else "1.0"
    try:
        made()
    finally:
        agreement.installed_version = version
        logging.getLogger("hybrid_moe").removeHandler(handler)
    return messages


def another_release_of_this_package(one, two):
    agreement.__version__ = "0.0.1" if RANK == 2 else __version__
    try:
        made()
    finally:
        agreement.__version__ = __version__


def some_of_the_ranks(one, two):
    group = dist.new_group([1, 2])
    if RANK == 2:
        one.reasons = ["not here"]
    if RANK:
        return list(layer_of(INPUTS, group=group, policy=make_policy()).explain(1).reasons)


def no_policy(one, two):
    """The warning is of this file, and there once, as without a group."""
    gpu = DeviceKey("nvidia_thing", (9, 0))
    with warnings.catch_warnings(record=True) as caught, mock.patch.object(DeviceKey, "of", lambda device: gpu):
        warnings.simplefilter("always")
        HybridMoE(
            *INPUTS[4:8],
            INPUTS.routing_bias,
            local_expert_offset=5,
            routed_scaling_factor=2.5,
            problem=PROBLEM,
            group=dist.group.WORLD,
        )
    return [[Path(each.filename).name, str(each.message)[:40]] for each in caught]


def a_copy(one, two):
    layer = made()
    if RANK == 1:
        one.reasons = ["not here"]
        backends.not_supported_reasons.cache_clear()
        return choices(copy.deepcopy(layer))  # waits for nobody
    return choices(layer)


SCENARIOS = (
    alike,
    another_policy,
    another_backend,
    one_named_backend,
    a_package_that_one_rank_lacks,
    a_refusal_that_follows_from_another,
    a_failure_to_prepare,
    a_rank_that_raises,
    nothing_that_all_can_run,
    quarantine_and_release,
    a_failure_to_warm_up,
    a_rank_that_cannot_warm_up,
    another_policy_later,
    another_release,
    another_release_of_this_package,
    some_of_the_ranks,
    no_policy,
    a_copy,
)


def main():
    """Run all of them, each with two fresh backends."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(FOLDER / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=RANKS, timeout=timedelta(seconds=60))
    results = {}
    for scenario in SCENARIOS:
        dist.barrier()
        backends.not_supported_reasons.cache_clear()
        backends.prepare.cache_clear()
        release_quarantine()
        pair = Late("one", 1.0), Late("two", 2.0)
        backends.BACKENDS.update({each.name: each for each in pair})
        try:
            results[scenario.__name__] = scenario(*pair)
        except Exception as error:  # whatever it ends with is what is looked at
            results[scenario.__name__] = f"{type(error).__name__}: {error}"
    (FOLDER / f"results{RANK}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
