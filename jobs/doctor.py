"""What every host is, how hosts differ, what is wrong, and how to put it right; changes nothing:

    mpirun -hostfile hostfiles/local2 python jobs/doctor.py
    mpirun -hostfile hostfiles/macs python jobs/doctor.py --hostfile hostfiles/macs
    mpirun -hostfile hostfiles/macs python jobs/doctor.py --write hostfiles/macs.yaml
    python jobs/doctor.py                                # this host alone, no MPI

With `--hostfile` every host first tries to connect to the others from this very interpreter, before
MPI is started, which would hang where macOS does not let it. `--write` keeps what the hosts are for
jobs, which then give the faster ones more to do. Leaves `doctor.json`. The exit code is 78 where
something has to be done first, else 0.
"""

from __future__ import annotations

import argparse
from typing import NoReturn

from hpcmlx.comm import run_tool
from hpcmlx.doctor.visit import check_connections, visit


def main() -> NoReturn:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hostfile", help="connect to its hosts before MPI is started")
    parser.add_argument("--run-dir", help="where doctor.json goes; a new one in runs/ by default")
    parser.add_argument("--write", metavar="FILE", help="YAML file that says what the hosts are")
    args = parser.parse_args()
    told = {"description": args.write, "hostfile": args.hostfile}

    def connect() -> None:
        if args.hostfile:
            check_connections(args.hostfile)

    run_tool("doctor", lambda world: visit(world, args.run_dir, **told), before=connect)


if __name__ == "__main__":
    main()
