"""Our side of each contest, in processes of their own as the peers are."""
