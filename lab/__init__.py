"""Research tools: look into a Backpack, edit and teach it, measure it, move its weights. See lab/README.md."""
