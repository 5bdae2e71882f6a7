"""A sweep on SLURM: each worker is a job of its own, results come back as they are known.

    pip install -r requirements.txt -r requirements-cluster.txt
    python data/recipes/slurm_sweep.py            # on the login node, from the root; in tmux
    python data/recipes/slurm_sweep.py --local 2  # the same on this machine, to try it
    python data/recipes/slurm_sweep.py --show     # the job script, and nothing started

Dask sends functions to its workers as pickles, which run code where they are read: whoever reaches
the scheduler's port can run code in its jobs, so keep it inside the cluster's own network (Dask's
`security=` encrypts and asks for certificates); `--local` listens on this machine alone.

Stopped or failed? The same command computes only what is missing. Other schedulers: dask_jobqueue
has PBSCluster, LSFCluster…; Kubernetes: dask_kubernetes.operator.KubeCluster; plain machines:
distributed.SSHCluster. Nothing else changes.
"""

import argparse

from helpers import studies

JOB = dict(
    queue="gpu",  # your cluster's partition
    walltime="04:00:00",
    memory="32GB",  # of the node, not of its GPU
    cores=1,
    processes=1,  # one run at a time per worker: a run has the model to itself
    job_cpu=4,
    job_extra_directives=["--gres=gpu:1"],
    # jobs start where you started this
    job_script_prologue=["source .venv/bin/activate", "export WORKBOOK_THREADS=4"],
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + ".")
    parser.add_argument("--study", default="goldilocks", choices=studies.names())
    fetched = "fetch it once before, on a node with a network"
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B-Instruct", help=fetched)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--local", type=int, metavar="WORKERS", help="worker processes here")
    parser.add_argument("--show", action="store_true", help="print the job script and stop")
    options = parser.parse_args()
    if options.local:
        from distributed import LocalCluster

        here = dict(host="127.0.0.1", dashboard_address="127.0.0.1:0")  # this machine alone
        cluster = LocalCluster(n_workers=options.local, threads_per_worker=1, **here)
    else:
        from dask_jobqueue import SLURMCluster

        cluster = SLURMCluster(**JOB)
        if options.show:
            return print(cluster.job_script())
        cluster.scale(jobs=options.jobs)
    from distributed import Client

    with cluster, Client(cluster) as client:
        print(f"wrote {studies.run(options.study, options.model, executor=client)}")


if __name__ == "__main__":
    main()
