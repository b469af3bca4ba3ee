# Prints the Python that `make` builds .venv with: the one named, else .venv's own, else the first on PATH that works.
#
#   tools/find_python.sh [PYTHON]   one path
#   tools/find_python.sh --all      the first that works of each version, one per line
#
# A name on PATH is not yet a Python: a shim of pyenv may only say that the version is not chosen, and Debian's has no
# ensurepip without python3.x-venv. So each is run. Only the shell's own commands are used, as PATH may hold no others.

versions="python3.11 python3.12 python3.13 python3.14"
newline='
'
check='
import sys
if sys.version_info < (3, 11):
    sys.exit("Python %d.%d is too old; mnclglf needs 3.11 or newer" % sys.version_info[:2])
try:
    import ctypes, ensurepip, ssl, venv, zlib
except ImportError as error:
    remedy = "; on Debian or Ubuntu: apt install python%d.%d-venv" % sys.version_info[:2]
    sys.exit("cannot make virtual environments (%s)%s" % (error, remedy if "ensurepip" in str(error) else ""))
'

# Returns whether $1 works; `problem` says why not.
works() {
  problem=$("$1" -c "$check" 2>&1 </dev/null) && return 0
  problem=${problem%%"$newline"*}
  problem=${problem:-it ends without a word}
  return 1
}

fail() {
  printf 'setup: %s\n' "$1" >&2
  exit 1
}

asked=$1
if [ -n "$asked" ] && [ "$asked" != --all ]; then
  command -v "$asked" >/dev/null || fail "there is no $asked; install it, or name another: make setup PYTHON=/path/to/python3.12"
  works "$asked" || fail "$asked does not do: $problem; name another: make setup PYTHON=/path/to/python3.12"
  printf '%s\n' "$asked"
  exit 0
fi

# The Python that .venv was made with stays the choice; a .venv made anew by another one would be a surprise.
if [ -z "$asked" ] && [ -r .venv/pyvenv.cfg ]; then
  while IFS= read -r line; do
    case $line in
      "executable = "*)
        own=${line#executable = }
        if works "$own"; then
          printf '%s\n' "$own"
          exit 0
        fi
        ;;
    esac
  done <.venv/pyvenv.cfg
fi

tried=
found=
for version in $versions; do
  seen=
  rest=$PATH:
  while [ -n "$rest" ]; do
    folder=${rest%%:*}
    rest=${rest#*:}
    candidate=${folder:-.}/$version
    # The .venv of here is left out where it is activated: setup may delete it.
    if [ ! -x "$candidate" ] || [ -d "$candidate" ] || [ "$folder" -ef .venv/bin ]; then continue; fi
    seen=yes
    if works "$candidate"; then
      printf '%s\n' "$candidate"
      found=yes
      if [ "$asked" = --all ]; then break; else exit 0; fi
    fi
    tried="$tried$newline  $candidate: $problem"
  done
  [ -n "$seen" ] || tried="$tried$newline  $version: not on PATH"
done
if [ "$asked" = --all ] || [ -n "$found" ]; then exit 0; fi
fail "no Python here can make virtual environments. Tried:$tried
Remedy: install one of $versions (on Debian or Ubuntu also its -venv package), or name one: make setup PYTHON=/path/to/python3.12"
