"""Work of teachers on several GPUs or machines, by Ray."""
