"""The command mmdlm, and the command line of recipes and jobs."""
