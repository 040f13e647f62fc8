"""The stage `caption`: a vision-language model names the action, the objects and the relations of each image."""
