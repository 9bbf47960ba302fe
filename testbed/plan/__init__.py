"""From a scenario to what will be done on this machine: operations as values, dilation, and what the lint found."""
