"""What every host of a job is, how hosts differ, and what to do about it (`jobs/doctor.py`)."""
