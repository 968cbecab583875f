"""Running on a cluster: jobs sent there, and what is built from them."""
