"""Running a model over more than one process can hold, and handing it on."""
