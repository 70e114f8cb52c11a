# Some sites define the command for login shells only.
if ! command -v module >/dev/null; then
    for file in /etc/profile.d/{modules,lmod,z00_lmod,00-modulepath}.sh /usr/share/{modules,lmod/lmod}/init/bash; do
        # shellcheck source=/dev/null
        if [ -r "$file" ]; then . "$file"; fi
    done
fi
