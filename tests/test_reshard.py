"""A checkpoint of one number of ranks, taken up by another: weights, moments and the next step are the same."""

import copy

import pytest

torch = pytest.importorskip("torch")
SAVED_BY = 2  # ranks


def trained(ranks, steps):
    """A model on this rank's share of the parameters, some of odd sizes, and its optimizer, after so many steps."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(ranks)  # other numbers of ranks begin at other weights
    model = torch.nn.Sequential(torch.nn.Embedding(7, 6), torch.nn.Linear(6, 5), torch.nn.Linear(5, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    model(torch.arange(7)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def whole_state(model, optimizer):
    """Weights and moments, gathered."""
    moments = [value for state in optimizer.state.values() for value in state.values()]
    values = [*model.state_dict().values(), *moments]
    return [value.full_tensor() if hasattr(value, "full_tensor") else value for value in values]


def work(rank, ranks, folder):
    """Save after two steps and record the state then and after a third; or take that up and compare."""
    from verl_recipes.in_verl.reshard import reshard

    torch.distributed.init_process_group("gloo", f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    model, optimizer = trained(ranks, 2 if ranks == SAVED_BY else 0)
    if ranks == SAVED_BY:
        for kind, state in (("model", model.state_dict()), ("optim", optimizer.state_dict()), ("extra_state", {})):
            torch.save(state, folder / f"{kind}_world_size_{ranks}_rank_{rank}.pt")
        states = copy.deepcopy(whole_state(model, optimizer))
        step(model, optimizer)
        states = states, whole_state(model, optimizer)
        if rank == 0:
            torch.save(states, folder / "states.pt")
    else:
        (target := folder / str(rank)).mkdir()
        reshard(folder, target, model, optimizer, rank, ranks)
        names = (target / f"{kind}_world_size_{ranks}_rank_{rank}.pt" for kind in ("model", "optim"))
        for each, name in zip((model, optimizer), names, strict=True):
            each.load_state_dict(torch.load(name, weights_only=False))
        for expected in torch.load(folder / "states.pt"):
            torch.testing.assert_close(whole_state(model, optimizer), expected)
            step(model, optimizer)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("room", [True, False])
def test_offloaded_weights_stay_where_they_are_if_the_gpu_has_no_room_for_the_files_too(monkeypatch, room):
    """What a GPU alone shows is left out: whether they then fit, and are the same."""
    from verl_recipes.in_verl import reshard

    class Engine:
        module, _is_offload_param, _is_offload_optimizer = None, True, True

        def load_checkpoint(self, path):
            self.loaded = path, self._is_offload_param

    monkeypatch.setattr(reshard, "lacks_room", lambda module: not room)
    engine = type("Offloaded", (reshard.Resharding, Engine), {})()
    engine.load("folder")
    assert (engine.loaded, engine._is_offload_param) == (("folder", room), True)


@pytest.mark.slow
def test_fewer_and_more_ranks_go_on_as_those_that_saved_would_have(tmp_path):
    """The last weight has one row, so that some ranks have none of it."""
    for ranks in (SAVED_BY, 1, 3):
        (folder := tmp_path / str(ranks)).mkdir()
        for file in (tmp_path / str(SAVED_BY)).glob("*.pt") if ranks != SAVED_BY else ():
            (folder / file.name).symlink_to(file)
        torch.multiprocessing.spawn(work, (ranks, folder), nprocs=ranks)
