"""Who is behind in a job that stands still or was killed: from the ranks' flight files, no MPI."""
