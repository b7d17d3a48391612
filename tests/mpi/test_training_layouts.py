"""A run that stops in one layout and goes on in another ends as one that never stopped.

Every ordered pair of six layouts. Each is trained on as many of the four ranks as it needs, so
checkpoints are written and read by one, two, three and four of them.
"""

from __future__ import annotations

import pytest

from hpcmlx import comm
from hpcmlx.mesh import Mesh
from hpcmlx.training.checkpoints.store import CheckpointStore
from hpcmlx.training.optim import OptimSettings
from tests.training_runs import (
    ADAMW,
    Gathering,
    Setup,
    TrainLayout,
    batches,
    examples,
    open_run,
    save_model,
)

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.fault,
    pytest.mark.skipif(comm.init().size != 4, reason="layouts of one to four ranks"),
]

LAYOUTS = [
    TrainLayout(),
    TrainLayout(tp=2),
    TrainLayout(tp=3, tp_shares=(3, 2, 1)),
    TrainLayout(pp=2, pp_layers=(0, 1)),
    TrainLayout(dp=2, zero1=True),
    TrainLayout(pp=2, tp=2),
]
SAVED, STEPS = 3, 5
TOLERANCE = 1e-5
DATA = examples(40)


@pytest.mark.parametrize(
    "optim, savers",
    [(ADAMW, LAYOUTS), (OptimSettings("adafactor", 1e-2), [LAYOUTS[2], LAYOUTS[4]])],
    ids=["adamw", "adafactor"],
)
def test_every_pair_of_layouts(optim, savers, world, shared, on_root):
    """Tied ends and KV heads that two ranks hold are in it."""
    path, setup = shared / "resumed", Setup(optim=optim, total_steps=STEPS)
    on_root(lambda: path.exists() or save_model(path, "llama_tied"))
    places = [part_of_world(world, layout) for layout in LAYOUTS]
    whole = {}  # on rank 0: losses and parameters of runs that never stopped
    for layout, ranks in zip(LAYOUTS, places, strict=True):
        if ranks is not None:
            store = CheckpointStore(shared / f"{optim.name}-{layout}", ranks)
            whole[layout] = uninterrupted(path, ranks, layout, setup, store)
        world.barrier()
    worst, failures = 0.0, []
    for saver in savers:
        for layout, ranks in zip(LAYOUTS, places, strict=True):
            if ranks is not None:
                store = CheckpointStore(shared / f"{optim.name}-{saver}", ranks)
                losses, last = resumed(path, ranks, layout, setup, store)
                if last is not None:
                    truth = whole[layout if saver == layout else LAYOUTS[0]]
                    error = difference((losses, last), truth)
                    worst = max(worst, error)
                    if error > (0.0 if saver == layout else TOLERANCE):
                        failures.append(f"{saver} -> {layout}: {error:.1e}")
            world.barrier()
    print(f"{optim.name}: {worst:.1e}")
    assert not failures, failures
    world.barrier()


def part_of_world(world: comm.Communicator, layout: TrainLayout) -> comm.Communicator | None:
    """The first ranks, as many as the layout needs; None on the others."""
    inside = world.rank < layout.dims.world_size
    ranks = world.split(0 if inside else 1, world.rank, graph=True)
    return ranks if inside else None


def uninterrupted(path, ranks, layout, setup, store) -> tuple[list[float], Gathering | None]:
    with open_run(path, Mesh(layout.dims, ranks), layout, setup) as run:
        plan = batches(DATA, layout.dp, STEPS)
        run.train(DATA, plan, 0, SAVED)
        store.save(SAVED, run.trainer.pieces(), {"step": SAVED})
        results = run.train(DATA, plan, SAVED, STEPS)
        store.poll(wait=True)
        return [r.loss for r in results], run.gather(run.stages.parameters())


def resumed(path, ranks, layout, setup, store) -> tuple[list[float], Gathering | None]:
    with open_run(path, Mesh(layout.dims, ranks), layout, setup) as run:
        with store.find() as found:
            run.trainer.restore(found)
            start = found.state["step"]
        results = run.train(DATA, batches(DATA, layout.dp, STEPS), start, STEPS)
        return [r.loss for r in results], run.gather(run.stages.parameters())


def difference(ours, theirs) -> float:
    """The largest one: of losses, relative, and of any rank's part of any parameter, in units of
    its largest number. Exactly 0 where everything is equal bit for bit."""
    losses = max(abs(a / b - 1) for a, b in zip(ours[0], theirs[0], strict=True))
    return max(losses, ours[1].error(theirs[1].whole())[0])
