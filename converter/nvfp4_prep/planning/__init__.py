"""Plans: frozen values that say which bytes go where. Nothing here writes."""
