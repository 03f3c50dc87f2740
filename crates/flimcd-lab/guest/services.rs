//! What the guest offers: an echo service (TCP and UDP port 7000), and commands, one a line, over TCP
//! port 7001 and the second serial line. Each command is answered by lines of which the last begins
//! with `OK` or `ERROR`.
//!
//! | command | answer |
//! | --- | --- |
//! | `status` | `OK seq=… reads=… errors=…` |
//! | `mark NAME KIB` | writes a file and waits for the disk; `OK SUM` |
//! | `sums` | `SUM NAME SUM` for each file |
//! | `verify` | reads files, the whole load and its memory; `OK files=… blocks=… pages=… errors=…` |
//! | `stop`, `start` | the load; after `stop` everything is on the disk |
//! | `rate WRITES READS` | operations per second from now on |
//! | `poweroff` | everything to the disk, file systems read-only, power off |

use std::{
    fs::{File, OpenOptions},
    io::{self, BufReader, Read as _, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    process::Command,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use crate::{load::Load, marks::Marks};

const ECHO_PORT: u16 = 7000;
const CONTROL_PORT: u16 = 7001;
/// The second serial line; init has made it raw.
const CONTROL_LINE: &str = "/dev/ttyS1";

/// What commands work on.
pub(crate) struct Guest {
    pub(crate) load: Arc<Load>,
    pub(crate) marks: Mutex<Marks>,
}

/// Starts all services on threads of their own.
pub(crate) fn start(guest: &Arc<Guest>) -> io::Result<()> {
    let udp = UdpSocket::bind(("0.0.0.0", ECHO_PORT))?;
    thread::spawn(move || echo_datagrams(&udp));
    let echo = TcpListener::bind(("0.0.0.0", ECHO_PORT))?;
    thread::spawn(move || serve(&echo, echo_stream));
    let control = TcpListener::bind(("0.0.0.0", CONTROL_PORT))?;
    let over_tcp = Arc::clone(guest);
    thread::spawn(move || {
        serve(&control, move |stream| {
            let mut answers = stream.try_clone()?;
            over_tcp.serve(BufReader::new(stream), &mut answers)
        });
    });
    if let Ok(line) = OpenOptions::new().read(true).write(true).open(CONTROL_LINE) {
        let guest = Arc::clone(guest);
        thread::spawn(move || {
            // Ends when the line is gone, which it never is.
            let _ = serial(&guest, &line);
        });
    }
    Ok(())
}

fn serial(guest: &Guest, line: &File) -> io::Result<()> {
    guest.serve(BufReader::new(line.try_clone()?), &mut line.try_clone()?)
}

fn serve(
    listener: &TcpListener,
    each: impl Fn(TcpStream) -> io::Result<()> + Clone + Send + 'static,
) {
    for stream in listener.incoming().flatten() {
        let each = each.clone();
        thread::spawn(move || {
            let _ = stream.set_nodelay(true);
            // The other end went away; it comes again if it wants to.
            let _ = each(stream);
        });
    }
}

fn echo_stream(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            n => stream.write_all(&buffer[..n])?,
        }
    }
}

fn echo_datagrams(socket: &UdpSocket) {
    let mut buffer = [0; 2048];
    loop {
        if let Ok((n, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..n], from);
        }
    }
}

impl Guest {
    fn serve(&self, mut requests: impl io::BufRead, answers: &mut impl Write) -> io::Result<()> {
        let mut line = Vec::new();
        loop {
            line.clear();
            if requests.read_until(b'\n', &mut line)? == 0 {
                return Ok(());
            }
            let text = String::from_utf8_lossy(&line);
            if text.trim().is_empty() {
                continue;
            }
            let answer = self
                .answer(text.trim())
                .unwrap_or_else(|error| format!("ERROR {error}"));
            answers.write_all(format!("{answer}\n").as_bytes())?;
            answers.flush()?;
        }
    }

    fn marks(&self) -> MutexGuard<'_, Marks> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, command: &str) -> Result<String, Box<dyn std::error::Error>> {
        let words: Vec<&str> = command.split_whitespace().collect();
        Ok(match words[..] {
            ["status"] => format!("OK {}", self.load.totals()),
            ["mark", name, kib] => {
                let sum = self.marks().write(name, kib.parse()?)?;
                format!("OK {sum:016x}")
            }
            ["sums"] => {
                let marks = self.marks();
                let lines = marks
                    .sums()
                    .map(|(name, sum)| format!("SUM {name} {sum:016x}\n"));
                lines.collect::<String>() + "OK"
            }
            ["verify"] => {
                let marks = self.marks();
                let files = marks.sums().count();
                self.load.add_errors(marks.verify());
                drop(marks);
                let (blocks, pages, _) = self.load.verify();
                let errors = self.load.errors();
                format!("OK files={files} blocks={blocks} pages={pages} errors={errors}")
            }
            ["stop"] => {
                self.load.set_running(false);
                format!("OK {}", self.load.totals())
            }
            ["start"] => {
                self.load.set_running(true);
                "OK".into()
            }
            ["rate", writes, reads] => {
                self.load.set_rates(writes.parse()?, reads.parse()?);
                "OK".into()
            }
            ["poweroff"] => {
                self.load.set_running(false);
                Command::new("/bin/busybox").arg("sync").status()?;
                // Remounts everything read-only, then switches off: the answer comes before that.
                thread::spawn(power_off);
                "OK".into()
            }
            _ => return Err(format!("unknown command {command:?}").into()),
        })
    }
}

fn power_off() {
    thread::sleep(std::time::Duration::from_millis(200));
    for key in ["u", "o"] {
        let _ = std::fs::write("/proc/sysrq-trigger", key);
    }
}
