# Sourced by the download scripts.
count_files() { # folder, pattern, how many there should be, what they are
    local found=0
    [ ! -d "$1" ] || found=$(find "$1" -name "$2" | wc -l)
    echo "$((found)) of $3 $4"
    [ "$((found))" -eq "$3" ] || echo "note: $1 is not complete; mode=check_data names what is missing" >&2
}
