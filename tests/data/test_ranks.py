"""Ranks of torchrun that are killed and restarted with another world size."""

import json
import subprocess
import sys

import pytest

import relabel_datasets as rd
from tests.conftest import ROOT

RANK = """
import json, sys, torch
import relabel_datasets as rd

folder, out, num_workers, stop = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
stream = rd.load_dataset(folder, "colours", "train", streaming=True, remainder="uneven",
                         transforms=lambda image, label_map: int(label_map.key[-2:]))
loader = rd.RelabelLoader(stream, 1, num_workers=num_workers)
try:
    loader.load_state_dict(json.load(open(f"{out}/state.json")))
except FileNotFoundError:
    loader.set_epoch(7)
seen = []
for batch in loader:
    seen += batch.tolist()
    if len(seen) == stop:
        break
with open(f"{out}/seen-{torch.distributed.get_world_size()}-{rank}.json", "w") as file:
    json.dump(seen, file)
state = loader.state_dict()
torch.distributed.barrier()
if rank == 0:
    json.dump(state, open(f"{out}/state.json", "w"))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_of_torchrun_resume_with_another_world_size(dataset_folder, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)

    def run(num_ranks, num_workers, stop):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={num_ranks}",
            script,
        ]
        arguments = [str(dataset_folder), str(tmp_path), str(num_workers), str(stop)]
        subprocess.run([*command, *arguments], check=True, cwd=ROOT, capture_output=True, timeout=300)
        return [json.loads((tmp_path / f"seen-{num_ranks}-{rank}.json").read_text()) for rank in range(num_ranks)]

    seen = [number for rank in run(3, 1, 2) for number in rank]
    assert len(seen) == 6
    state = json.loads((tmp_path / "state.json").read_text())
    assert (state["epoch"], state["stages"]) == (7, [[3, 2]])
    ranks = run(2, 2, -1)
    assert sorted(map(len, ranks)) == [3, 4]
    assert sorted(seen + ranks[0] + ranks[1]) == list(range(13))
    assert len(rd.load_dataset(dataset_folder, "colours", "train")) == 13
