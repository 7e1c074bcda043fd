"""Parts that the plugins of all servers share: the stamp, a rank's share of a layer, and what arrived of it."""
