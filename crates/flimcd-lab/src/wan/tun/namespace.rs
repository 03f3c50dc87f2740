//! A network namespace without a name, held by a descriptor.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::Command,
    thread,
};

/// A network namespace.
#[derive(Debug)]
pub(crate) struct Namespace(OwnedFd);

impl Namespace {
    /// A new one with nothing in it.
    pub(crate) fn new() -> io::Result<Self> {
        // On a thread of its own, because a thread that leaves its namespace is of little use to
        // others afterwards.
        let make = || -> io::Result<Self> {
            unshare(libc::CLONE_NEWNET)?;
            Ok(Self(File::open("/proc/thread-self/ns/net")?.into()))
        };
        let thread = thread::Builder::new()
            .name("wan-namespace".into())
            .spawn(make)?;
        thread
            .join()
            .map_err(|_| io::Error::other("a thread of the lab panicked"))?
    }

    /// Starts `work` on a thread of its own in the namespace.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<SideThread<T>> {
        let namespace = self.0.try_clone()?;
        let (entered, result) = std::sync::mpsc::channel();
        let thread = thread::Builder::new()
            .name("wan-side".into())
            .spawn(move || {
                let outcome = enter(&namespace);
                let is_inside = outcome.is_ok();
                // The receiver waits for exactly this.
                let _ = entered.send(outcome);
                is_inside.then(work)
            })?;
        result.recv().map_err(io::Error::other)??;
        Ok(SideThread(thread))
    }

    /// Runs `work` in the namespace and waits for it.
    pub(super) fn run_here<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let panicked = |_| io::Error::other("a thread of the lab panicked");
        self.run(work)?.join().map_err(panicked)?
    }

    /// A path at which other processes find it, as long as this one lives.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Makes `command` enter the namespace before it runs its program.
    pub(crate) fn put_in(&self, command: &mut Command) -> io::Result<()> {
        let namespace = self.0.try_clone()?;
        // SAFETY: the closure runs between fork and exec. It makes one system call on a descriptor
        // that it owns, and allocates nothing.
        unsafe {
            command.pre_exec(move || enter(&namespace));
        }
        Ok(())
    }
}

/// A thread in a side's namespace. It goes on when this is dropped.
#[derive(Debug)]
pub struct SideThread<T>(thread::JoinHandle<Option<T>>);

impl<T> SideThread<T> {
    /// Waits for the thread.
    ///
    /// # Errors
    /// Its panic.
    ///
    /// # Panics
    /// Never: a thread that could not enter its namespace is not handed out.
    pub fn join(self) -> thread::Result<T> {
        self.0
            .join()
            .map(|value| value.expect("it entered the namespace"))
    }
}

fn enter(namespace: &OwnedFd) -> io::Result<()> {
    // SAFETY: setns takes an open descriptor and changes only the calling thread.
    let result = unsafe { libc::setns(namespace.as_fd().as_raw_fd(), libc::CLONE_NEWNET) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: unshare takes flags and changes only the calling thread.
    let result = unsafe { libc::unshare(flags) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Makes `command` run as root of a new user namespace, in which it may build a
/// [`super::NamespaceLab`] without being root outside. Not every system allows it, and TUN devices
/// also need `/dev/net/tun` to be open to the user; spawning the command says so.
pub fn in_user_namespace(command: &mut Command) {
    let (user, group) = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    let (users, groups) = (format!("0 {user} 1"), format!("0 {group} 1"));
    // SAFETY: the closure runs between fork and exec, in a process with one thread. It opens,
    // writes and closes small files; their content was made before the fork, and paths as short
    // as these are passed to the system from the stack, without allocation.
    unsafe {
        command.pre_exec(move || {
            unshare(libc::CLONE_NEWUSER)?;
            fs::write("/proc/self/setgroups", "deny")?;
            fs::write("/proc/self/uid_map", &users)?;
            fs::write("/proc/self/gid_map", &groups)
        });
    }
}
