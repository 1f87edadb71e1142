"""Where pictures come from: folders, tars, tables, patches of pictures, and their formats."""
