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
import sys
from typing import NoReturn

from hpcmlx import comm
from hpcmlx.comm import Communicator
from hpcmlx.doctor.visit import check_connections, visit
from hpcmlx.errors import ExitCode, HpcmlxError


def main() -> NoReturn:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hostfile", help="connect to its hosts before MPI is started")
    parser.add_argument("--run-dir", help="where doctor.json goes; a new one in runs/ by default")
    parser.add_argument("--write", metavar="FILE", help="YAML file that says what the hosts are")
    args = parser.parse_args()
    world = Communicator()
    try:
        if args.hostfile:
            check_connections(args.hostfile)
        world = comm.init()
        code = visit(world, args.run_dir, description=args.write, hostfile=args.hostfile)
    except HpcmlxError as error:
        where = f"rank {world.rank} on {comm.hostname()}: " if world.size > 1 else ""
        print(f"doctor: {where}{error}", file=sys.stderr)
        world.abort(error.exit_code)
    except BaseException:  # whatever ends one rank must end them all
        sys.excepthook(*sys.exc_info())
        world.abort(ExitCode.INTERNAL)
    comm.finalize(code)


if __name__ == "__main__":
    main()
